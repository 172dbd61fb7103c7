"""``LTETrainer``: ``transformers.Trainer``, which calls a method's training, a teacher, and the stages of a run."""

import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.loss.loss_utils import ForCausalLMLoss

from lte.data.batches import hold_out_for_calibration
from lte.modules.recording import sparse_layers, track_sparsity
from lte.surgery.convert import install_routers_
from lte.surgery.method import Method
from lte.surgery.stages import Stage, StagePlan
from lte.surgery.training import Rows
from lte.training.arguments import LTETrainingArguments
from lte.training.checks import check_callbacks, check_model
from lte.training.compiling import Compilation
from lte.training.distillation import causal_loss, is_causal
from lte.training.distiller import Distiller
from lte.training.divergence import WatchedTrainer
from lte.training.learning_rate import stage_factors
from lte.training.resuming_trainer import ResumingTrainer
from lte.training.saving_trainer import SavingTrainer
from lte.training.stages import _Stages

logger = logging.getLogger(__name__)


class LTETrainer(ResumingTrainer, WatchedTrainer, SavingTrainer):
    """Makes a model sparse and trains it: dense (optional), soft and hard stage in one ``train()``.

    With a method whose routers are not trained there is no soft stage: after the dense one neurons are grouped anew and
    routers set on training rows, and the model gets used to them (hard). A mixture of experts has its balance loss in
    place of the efficiency and separability losses.

    Takes what ``transformers.Trainer`` takes; batches may be ragged, padding (attention mask 0) counts
    in no loss and no sparsity. Logs at each logging step ``task_loss``, ``sparsity`` and ``sparsity/layer_NN``; of LTE
    ``efficiency_loss``, ``separability_loss``, ``eta`` and ``near_tau`` (share of scores within 0.1 of tau); of a
    mixture ``balance_loss``.

    Args:
        model: dense, with a ``method``; or sparse already, by ``lte.sparsify_`` or as a run before left it.
        method: what makes a dense model sparse, e.g. ``lte.LTEConfig(target_sparsity=0.5)``. Neurons are grouped once,
            when the dense stage is over.
        calibration_dataset: rows to set thresholds on in the hard stage, so that ``target_sparsity`` is met on
            text like it: best a sample of what the model will see. None keeps some rows out of training for it.

    Attributes:
        method: of the model.
        training: the method's own.
        stages: where the run is.
        distiller: has the teacher, where there is one.

    Raises:
        ValueError: a dense model without a method, a sparse one with another, one of a method that the schedule or its
            target does not fit, one without logits that a teacher's could be compared with, one that is shared out by
            tensor parallelism, arguments of another class, or several GPUs in one process.
    """

    args: LTETrainingArguments

    def __init__(
        self,
        model: Any = None,
        args: LTETrainingArguments | None = None,
        calibration_dataset: Any = None,
        method: Method | None = None,
        **kwargs: Any,
    ):
        if not isinstance(args, LTETrainingArguments):
            raise ValueError("LTETrainer needs args=lte.LTETrainingArguments(output_dir, ...)")
        if method is not None:
            install_routers_(model, method)
        check_model(model, args)
        self.training = Method.from_dict(model.config.lte).training(args)
        self.method: Method = self.training.method
        model.config.lte |= self.method.to_dict()
        for layer in sparse_layers(model).values():  # a run before may have frozen them; the optimizer is made now
            layer.router.requires_grad_(True)
            if layer.compensation is not None:
                layer.compensation.requires_grad_(True)
        self.calibration_dataset, train_dataset = calibration_dataset, kwargs.get("train_dataset")
        if self.training.target is not None and calibration_dataset is None and train_dataset is not None:
            kept_out = hold_out_for_calibration(train_dataset, args.calibration_rows, args.seed)
            kwargs["train_dataset"], self.calibration_dataset = kept_out
        self._causal = is_causal(model)
        self._use_cache = getattr(model.config, "use_cache", None)
        super().__init__(model=model, args=args, **kwargs)
        if not self._causal:  # the losses of other heads take num_items_in_batch, and most do not look at it
            self.model_accepts_loss_kwargs = False
        elif self.label_smoother is not None:  # Trainer knows by its class's name that a model is causal
            self.label_smoother = functools.partial(self.label_smoother, shift_labels=True)
        self.compilation = Compilation(args, self.accelerator)
        # without gradients and an optimizer there is nothing that fp32 would be kept for, and bf16 is read faster
        self.distiller = Distiller(model, args, self.compilation, torch.bfloat16 if args.bf16 else None)
        self._causal_loss = self.compilation.only(ForCausalLMLoss)
        self._plain: tuple[Any, Any] = (None, None)
        self._flops_per_token: int | None = None
        self.stages = _Stages(self)
        self.add_callback(self.stages)

    @property
    def stage(self) -> Stage | None:
        return self.stages.stage

    @property
    def plain(self) -> Any:
        """The model without wrappers. Kept: to find it means a look at all modules, at every step."""
        if self._plain[0] is not self.model:
            self._plain = self.model, self.accelerator.unwrap_model(self.model)
        return self._plain[1]

    @property
    def rows(self) -> Rows:
        held_out = None if self.calibration_dataset is None else lambda: self._batches(self.calibration_dataset)
        return Rows(
            lambda: self._batches(self.train_dataset, self.args.seed), held_out, lambda: self.accelerator.autocast()
        )

    def _batches(self, dataset: Any, seed: int | None = None) -> Iterator[dict[str, Any]]:
        """Rows outside of the training loop, in an order of ``seed`` if it is given. Leaves the random state alone.

        The dataset is not looked at before the first batch is asked for: many methods ask for none.
        """
        loader = DataLoader(
            dataset,
            batch_size=self._train_batch_size,  # of the shape that blocks are compiled for already
            shuffle=seed is not None and hasattr(dataset, "__len__"),
            generator=torch.Generator().manual_seed(seed or 0),
            collate_fn=self._get_collator_with_removed_columns(self.data_collator),
        )
        for batch in loader:
            self.compilation.begin_pass()
            yield self._read_by_model(cast(dict[str, Any], self._prepare_inputs(batch)))

    def _read_by_model(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Labels only where the decoder reads them: else they are for a loss, which nobody wants of this pass."""
        decoder = getattr(self.plain.config, "is_encoder_decoder", False)
        return {name: value for name, value in inputs.items() if name != "labels" or decoder}

    # ---- what Trainer asks for

    def train(self, *args: Any, **kwargs: Any) -> Any:
        check_callbacks(self.callback_handler.callbacks, self.args)
        return super().train(*args, **kwargs)

    def train_from(self, checkpoint: Path | None, *args: Any, **kwargs: Any) -> Any:
        mode = self.plain.config.lte.get("mode", "dense")
        if mode != "dense" and not checkpoint and not self.args.is_dense:
            logger.warning(
                "the model is in mode %s, trained already: its weights are kept, but its routers and thresholds start "
                "anew; to train it as it is, take transformers.Trainer",
                mode,
            )
        result = super().train_from(checkpoint, *args, **kwargs)
        # mixed precision wrapped forward in autocast; the trained model is to run as it is, and optimised at full speed
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self._use_cache is not None:  # Trainer turns the KV cache off; the trained model is to generate with it
            self.plain.config.use_cache = self._use_cache
        return result

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optimizer = super().create_optimizer(*args, **kwargs)
            routers = [p for layer in sparse_layers(self.plain).values() for p in layer.router.parameters()]
            ids = {id(parameter) for parameter in routers}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in ids]
            matrices, vectors = [p for p in routers if p.ndim == 2], [p for p in routers if p.ndim < 2]
            for parameters, decay in ((matrices, self.args.router_weight_decay), (vectors, 0.0)):
                optimizer.add_param_group(
                    {"params": parameters, "lr": self.args.router_learning_rate, "weight_decay": decay}
                )
        return cast(torch.optim.Optimizer, self.optimizer)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        args = self.args
        self.stages.plan = (
            StagePlan(num_training_steps, 0, 0) if args.is_dense else self.training.plan(num_training_steps)
        )
        if self.lr_scheduler is None:
            factor = stage_factors(
                self.stages.plan,
                args.lr_scheduler_type,
                args.get_warmup_steps,
                cast(dict[str, Any], args.lr_scheduler_kwargs or {}),
                args.dense_learning_rate_factor,
                cast(bool, args.restart_hard),
            )
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or cast(torch.optim.Optimizer, self.optimizer), factor
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.clamp_min(1)  # nothing but padding: a loss of 0, not 0 / 0
        stage = self.stage
        if not model.training or stage not in ("soft", "hard"):
            with causal_loss(model, self._causal_loss if model.training else None):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.accelerator.autocast():
            lesson = self.distiller.lesson(self._read_by_model(inputs))
        with self.training.recording(stage) as recording, causal_loss(model, lesson.loss or self._causal_loss):
            wanted = {**inputs, **self.distiller.wanted}
            loss, outputs = cast(Any, super().compute_loss(model, wanted, True, num_items_in_batch))
        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        parts = self.current_gradient_accumulation_steps if scaled else 1  # the task loss is a share of so many's
        loss, task, divergence = lesson.mix(
            loss,
            outputs["logits"] if lesson.loss else None,
            inputs.get("labels"),
            self._causal,
            getattr(self.plain.config, "problem_type", None),
            num_items=num_items_in_batch if scaled else None,
            scale=self._ranks_scale if scaled else 1,
        )
        log = self.training.log
        if divergence is not None:
            log.note("distillation_loss", divergence * parts)
        log.note("task_loss", task * parts)
        extra = self.training.loss(stage, recording) + lesson.feature_loss(outputs, recording.masks, log)
        loss = loss + extra / parts  # a mean over this micro-batch
        return (loss, outputs) if return_outputs else loss

    @property
    def _ranks_scale(self) -> int:
        """``num_items_in_batch`` counts all ranks, gradients are averaged over them."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As ``Trainer``'s, but parameters are counted once: it takes a millisecond or more of every step."""
        tokens = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        if tokens is None:
            return super().floating_point_ops(inputs)
        if self._flops_per_token is None:
            self._flops_per_token = super().floating_point_ops(inputs) // tokens.numel()
        return self._flops_per_token * tokens.numel()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and (noted := self.training.log.entry()):
            logs = {**logs, **self.training.logged(), **noted}
        super().log(logs, *args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self.compilation.begin_pass()
        return self.compilation.keep(super().prediction_step(*args, **kwargs))

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """As ``Trainer``'s, of all rows: ``dataloader_drop_last`` says how training rows are put into batches."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``'s, in the model's present mode; adds ``eval_sparsity`` of this process's share."""
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        with track_sparsity(self.plain) as meter:
            output = super().evaluation_loop(*args, **kwargs)
        cast(dict[str, float], output.metrics)[f"{prefix}_sparsity"] = meter.overall
        return output
