"""``LTETrainer``: a ``transformers.Trainer`` that calls a method's training, a teacher, and the stages of a run."""

import functools
import logging
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.loss.loss_utils import ForCausalLMLoss

from lte.data.batches import hold_out_for_calibration
from lte.modules.recording import sparse_layers, track_sparsity
from lte.surgery.adapters import Adapters
from lte.surgery.convert import install_routers_
from lte.surgery.method import Method
from lte.surgery.stages import Stage, StagePlan
from lte.surgery.training import Rows
from lte.training.adapting_trainer import AdaptingTrainer
from lte.training.arguments import LTETrainingArguments
from lte.training.checks import check_callbacks, check_model
from lte.training.compiling import Compilation
from lte.training.defaults import ADAPTERS, settle_rates, settle_steps
from lte.training.distillation import causal_loss, is_causal
from lte.training.distiller import Distiller
from lte.training.divergence import WatchedTrainer
from lte.training.learning_rate import stage_factors
from lte.training.loss_warning import LossWarning
from lte.training.optimizers import first_state, slow_down_
from lte.training.pieces import PiecewiseLoss, check_pieces, headless
from lte.training.resuming_trainer import ResumingTrainer
from lte.training.saving_trainer import SavingTrainer
from lte.training.stages import _Stages

logger = logging.getLogger(__name__)


class LTETrainer(ResumingTrainer, WatchedTrainer, SavingTrainer, AdaptingTrainer):
    """Makes a model sparse and trains it: dense (optional), soft and hard stage in one ``train()``.

    If the method's routers are not trained, there is no soft stage. After the dense stage neurons are grouped and
    routers are set on training rows, and in the hard stage the model adapts to them. A mixture of experts has a balance
    loss in place of the efficiency and separability losses.

    It takes the arguments of ``transformers.Trainer``. Padding (attention mask 0) counts in no loss and no sparsity.
    The log has ``task_loss``, ``sparsity`` and ``sparsity/layer_NN``. With LTE it also has ``efficiency_loss``,
    ``separability_loss``, ``eta`` and ``near_tau`` (share of scores within 0.1 of tau), and with a mixture
    ``balance_loss``.

    Args:
        model: a dense model with a ``method``, or a sparse one, from ``lte.sparsify_`` or an earlier run.
        method: makes a dense model sparse, e.g. ``lte.LTEConfig(target_sparsity=0.5)``. Neurons are grouped once, after
            the dense stage.
        calibration_dataset: rows for thresholds in the hard stage. ``target_sparsity`` is met on text like these rows,
            so they should be like the text that the model will see. None keeps some training rows out for it.

    With ``lora_rank`` the weights are frozen, and the adapters are merged when training ends.

    Attributes:
        method: of the model.
        training: the method's ``Training``.
        stages: the current stage and its progress.
        distiller: has the teacher, if there is one.

    Raises:
        ValueError: a dense model has no method, a sparse model has another method, or the schedule or target does not
            fit the method. Or distillation has no logits, tensor parallelism divides the model, the arguments are of
            another class, or one process has several GPUs.
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
            method.training(args)  # says now if the two do not fit
            install_routers_(model, method)
        check_model(model, args)
        self.training = Method.from_dict(model.config.lte).training(args)
        self.method: Method = self.training.method
        model.config.lte |= self.method.to_dict()
        for layer in sparse_layers(
            model
        ).values():  # an earlier run may have frozen them, and the optimizer is made now
            layer.router.requires_grad_(True)
            if layer.compensation is not None:
                layer.compensation.requires_grad_(True)
        self.calibration_dataset, train_dataset = calibration_dataset, kwargs.get("train_dataset")
        if self.training.target is not None and calibration_dataset is None and train_dataset is not None:
            kept_out = hold_out_for_calibration(train_dataset, args.calibration_rows, args.seed)
            kwargs["train_dataset"], self.calibration_dataset = kept_out
        args = copy(args)  # values that are not given are set for this model and data
        settle_steps(args, kwargs.get("train_dataset"))
        self._causal = is_causal(model)
        self._use_cache = getattr(model.config, "use_cache", None)
        super().__init__(model=model, args=args, **kwargs)
        if not self._causal:  # the losses of other heads take num_items_in_batch, but most of them ignore it
            self.model_accepts_loss_kwargs = False
        elif self.label_smoother is not None:  # Trainer tells a causal model by the name of its class
            self.label_smoother = functools.partial(self.label_smoother, shift_labels=True)
        self.compilation = Compilation(args, self.accelerator)
        # the teacher has no gradients and no optimizer, so it does not need fp32; bf16 is read faster
        self.distiller = Distiller(model, args, self.compilation, torch.bfloat16 if args.bf16 else None)
        self._head = self.distiller.head = None
        if args.loss_in_pieces:
            self._head = self.distiller.head = check_pieces(model)
        self._causal_loss = self.compilation.only(ForCausalLMLoss)
        if args.lora_rank:
            self.adapters = Adapters(
                model, args.lora_rank, args.lora_targets or (), args.seed, autocast=args.bf16 or args.fp16
            )
        self._plain: tuple[Any, Any] = (None, None)
        self._flops_per_token: int | None = None
        self.stages = _Stages(self)
        self.add_callback(self.stages)
        self.add_callback(LossWarning(self.stages))

    @property
    def stage(self) -> Stage | None:
        return self.stages.stage

    @property
    def plain(self) -> Any:
        """The model without wrappers. It is cached, because the search looks at all modules."""
        if self._plain[0] is not self.model:
            self._plain = self.model, self.accelerator.unwrap_model(self.model)
        return self._plain[1]

    @property
    def rows(self) -> Rows:
        held_out = None if self.calibration_dataset is None else lambda: self._batches(self.calibration_dataset)
        return Rows(
            lambda: self._batches(self.train_dataset, self.args.seed), held_out, lambda: self.accelerator.autocast()
        )

    def _batches(self, dataset: Any, seed: int | None = None, labels: bool = False) -> Iterator[dict[str, Any]]:
        """Give batches outside of the training loop, in a random order by ``seed`` if it is given.

        The random state is kept. The dataset is read only with the first batch: many methods need no batch.
        """
        loader = DataLoader(
            dataset,
            batch_size=self._train_batch_size,  # blocks are compiled for this shape already
            shuffle=seed is not None and hasattr(dataset, "__len__"),
            generator=torch.Generator().manual_seed(seed or 0),
            collate_fn=self._get_collator_with_removed_columns(self.data_collator),
        )
        for batch in loader:
            self.compilation.begin_pass()
            inputs = cast(dict[str, Any], self._prepare_inputs(batch))
            yield inputs if labels else self._read_by_model(inputs)

    def _read_by_model(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return inputs without labels, unless the decoder reads them. These passes need no loss."""
        decoder = getattr(self.plain.config, "is_encoder_decoder", False)
        return {name: value for name, value in inputs.items() if name != "labels" or decoder}

    # ---- methods that Trainer calls

    def _identity(self) -> dict[str, Any]:
        with self.aside():
            return super()._identity()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.adapters is not None and self.adapters.finished:
            raise ValueError("the adapters of this run are merged: make a new LTETrainer to train the model again")
        check_callbacks(self.callback_handler.callbacks, self.args)
        self._settle_rates()
        return super().train(*args, **kwargs)

    def train_from(self, checkpoint: Path | None, *args: Any, **kwargs: Any) -> Any:
        if checkpoint and self.is_fsdp_enabled:
            raise ValueError("a run with FSDP cannot be resumed yet: train anew with overwrite, or without --fsdp")
        mode = self.plain.config.lte.get("mode", "dense")
        if mode != "dense" and not checkpoint and not self.args.is_dense:
            logger.warning(
                "the model is in mode %s, so it is trained already: its weights are kept, but its routers and "
                "thresholds start again; to train it as it is, use transformers.Trainer",
                mode,
            )
        result = super().train_from(checkpoint, *args, **kwargs)
        # mixed precision wrapped forward in autocast; the trained model must run without this wrapper
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.adapters is not None:
            self.adapters.finish()
        if self._use_cache is not None:  # Trainer turns the KV cache off, but the trained model generates with it
            self.plain.config.use_cache = self._use_cache
        return result

    def _settle_rates(self) -> None:
        rows = () if self.train_dataset is None else self._batches(self.train_dataset, self.args.seed, labels=True)
        with self.aside():
            settle_rates(self.args, self.plain, rows)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self._settle_rates()
            optimizer = super().create_optimizer(*args, **kwargs)
            routers = [p for layer in sparse_layers(self.plain).values() for p in layer.router.parameters()]
            ids = {id(parameter) for parameter in routers}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in ids]
            if self.adapters is not None:
                slow_down_(optimizer, self.adapters.matrices, 1 / ADAPTERS)
            matrices, vectors = [p for p in routers if p.ndim == 2], [p for p in routers if p.ndim < 2]
            for parameters, decay in ((matrices, self.args.router_weight_decay), (vectors, 0.0)):
                optimizer.add_param_group(
                    {"params": parameters, "lr": self.args.router_learning_rate, "weight_decay": decay}
                )
            self.first_state = first_state(optimizer)
        return cast(torch.optim.Optimizer, self.optimizer)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        args = self.args
        self.stages.plan = (
            StagePlan(num_training_steps, 0, 0) if args.is_dense else self.training.plan(num_training_steps)
        )
        if self.lr_scheduler is None:
            factor = stage_factors(
                self.stages.plan,
                cast(str, args.lr_scheduler_type),
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
            num_items_in_batch = num_items_in_batch.clamp_min(1)  # a batch of padding has a loss of 0, not 0 / 0
        stage, head = self.stage, self._head if model.training else None
        own_loss = self._causal_loss if head is None else PiecewiseLoss(head, None, None, 0.0)
        if not model.training or stage not in ("soft", "hard"):
            with causal_loss(model, own_loss if model.training else None), headless(head):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.accelerator.autocast():
            lesson = self.distiller.lesson(self._read_by_model(inputs))
        loss_of = causal_loss(model, lesson.loss or own_loss)
        with self.training.recording(stage) as recording, loss_of, headless(head):
            wanted = {**inputs, **self.distiller.wanted}
            loss, outputs = cast(Any, super().compute_loss(model, wanted, True, num_items_in_batch))
        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        parts = (
            self.current_gradient_accumulation_steps if scaled else 1
        )  # the task loss is a share of this number of micro-batches
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
        """The factor of the loss: ``num_items_in_batch`` counts all ranks, and gradients are averaged over them."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As ``Trainer``'s, but parameters are counted once: a count takes a millisecond or more of each step."""
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
        """As ``Trainer``'s, but with all rows: ``dataloader_drop_last`` is meant for training rows only."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``'s, in the model's current mode. It adds sparsities of this process's rows."""
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        with track_sparsity(self.plain) as meter:
            output = super().evaluation_loop(*args, **kwargs)
        metrics = cast(dict[str, float], output.metrics)
        metrics[f"{prefix}_sparsity"] = meter.overall
        if meter.attention_sparsity:
            metrics[f"{prefix}_attention_sparsity"] = meter.attention_sparsity
        return output
