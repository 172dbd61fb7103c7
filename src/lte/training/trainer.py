"""``LTETrainer``: the stages of every method on top of ``transformers.Trainer``, in one run that can be resumed."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import astuple
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import recursively_apply, reduce
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_callback import ExportableState

from lte.data.batches import hold_out_for_calibration
from lte.modules.mixture import Balance, record_balance
from lte.modules.recording import Recording, record_scores, sparse_layers, track_sparsity
from lte.modules.tensor_parallel import check_not_shared
from lte.surgery.method import Method
from lte.training.arguments import LTETrainingArguments
from lte.training.calibration import evaluating
from lte.training.checks import check_callbacks, check_dtype, check_head, check_method, check_sharded
from lte.training.controller import SparsityController
from lte.training.distillation import (
    DistilledLoss,
    block_error,
    causal_loss,
    is_causal,
    mix_rows,
    predicts,
    show_hidden_states_,
)
from lte.training.divergence import WatchedTrainer
from lte.training.identity import model_identity, run_identity
from lte.training.lock import alone_in
from lte.training.preflight import try_out
from lte.training.recomputing import check_recomputing
from lte.training.resuming import TEACHER, agreed, begin_run
from lte.training.saving_trainer import SavingTrainer
from lte.training.scores import lte_losses, measure_scores, mixture_loss
from lte.training.stage_changes import move_thresholds_, regroup_, set_stage_, sharpen_, start_routers_
from lte.training.stages import Stage, StagePlan
from lte.training.step_log import StepLog
from lte.training.teacher import keep_dtypes, load_teacher, make_teacher

logger = logging.getLogger(__name__)

_CALIBRATIONS = 4  # in the hard stage, evenly spaced; frozen routers' inputs move while the rest trains
_COMPARISONS = 10  # in the soft stage, of training rows' sparsity with that of others
_APART = 20  # steps between two of them at least: a short stage has fewer
_PROGRAMS = 32  # of a block under torch.compile: stages, teacher, evaluation; torch's own limit is 8


class LTETrainer(WatchedTrainer, SavingTrainer):
    """Trains a model made sparse by ``lte.sparsify_``: dense (optional), soft and hard stage in one ``train()``.

    With a method whose routers are not trained there is no soft stage: after the dense one neurons are grouped anew and
    routers set on training rows, and the model gets used to them (hard). A mixture of experts has its balance loss in
    place of the efficiency and separability losses.

    Takes what ``transformers.Trainer`` takes; batches may be ragged, padding (attention mask 0) counts
    in no loss and no sparsity. Logs at each logging step ``task_loss``, ``sparsity`` and ``sparsity/layer_NN``; of LTE
    ``efficiency_loss``, ``separability_loss``, ``eta`` and ``near_tau`` (share of scores within 0.1 of tau); of a
    mixture ``balance_loss``.

    Args:
        calibration_dataset: rows to set thresholds on in the hard stage, so that ``target_sparsity`` is met on
            text like it: best a sample of what the model will see. None keeps some rows out of training for it.

    Raises:
        ValueError: a dense model, one of a method that the recipe or its target does not fit, one without logits that a
            teacher's could be compared with, one that is shared out by tensor parallelism, arguments of another class,
            or several GPUs in one process.
    """

    args: LTETrainingArguments

    def __init__(
        self,
        model: Any = None,
        args: LTETrainingArguments | None = None,
        calibration_dataset: Any = None,
        **kwargs: Any,
    ):
        if not isinstance(args, LTETrainingArguments):
            raise ValueError("LTETrainer needs args=lte.LTETrainingArguments(output_dir, target_sparsity=...)")
        if args.n_gpu > 1:
            raise ValueError(
                f"LTETrainer does not use DataParallel, but this one process sees {args.n_gpu} GPUs: start it with "
                "torchrun --nproc_per_node N, or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        if model is None:
            raise ValueError("LTETrainer needs a model, made sparse by lte.sparsify_: it does not take model_init")
        if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "LTETrainer trains all weights, and this model has adapters of peft: merge them before, or put them on "
                "the trained model and use transformers.Trainer"
            )
        layers = sparse_layers(model).values()  # says what to do if there are none
        for layer in layers:  # a run before may have frozen them, and the optimizer is made before the stages begin
            layer.router.requires_grad_(True)
            if layer.compensation is not None:
                layer.compensation.requires_grad_(True)
        check_not_shared(cast(nn.Module, model), "LTETrainer groups and fits")
        check_head(model, args)
        for parameter in model.parameters():
            if parameter.requires_grad:
                check_dtype(parameter.dtype)
        self._linear = all(layer.router.is_linear for layer in layers)
        self._causal = is_causal(cast(nn.Module, model))
        self.method = Method.from_dict(cast(Any, model).config.lte)
        if not self._linear:
            check_method(self.method, args)
        self.calibration_dataset = calibration_dataset
        train_dataset = kwargs.get("train_dataset")
        if args.target_sparsity is not None and calibration_dataset is None and train_dataset is not None:
            if not hasattr(train_dataset, "__len__"):
                raise ValueError(
                    "train_dataset has no length, so no rows of it can be kept out to set thresholds on: give "
                    "calibration_dataset=..."
                )
            kwargs["train_dataset"], self.calibration_dataset = hold_out_for_calibration(
                train_dataset, args.calibration_rows, args.seed
            )
        if args.feature_distillation_weight:
            show_hidden_states_(cast(nn.Module, model))
        self._use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        if args.torch_compile:
            torch._dynamo.config.recompile_limit = max(_PROGRAMS, torch._dynamo.config.recompile_limit)
        super().__init__(model=model, args=args, **kwargs)
        if not self._causal:  # the losses of other heads take num_items_in_batch, and most do not look at it
            self.model_accepts_loss_kwargs = False
        elif self.label_smoother is not None:  # Trainer knows by its class's name that a model is causal
            self.label_smoother = functools.partial(self.label_smoother, shift_labels=True)
        self.plan = StagePlan(0, 0, 0)
        self.progress = 0.0
        self._forget()
        self._model_identity: dict[str, Any] | None = None
        self._found: tuple[Any, Any, dict[str, Any]] = (None, None, {})
        self._flops_per_token: int | None = None
        self._measure_scores = self._compiled(measure_scores)
        self._mix_rows = self._compiled(mix_rows) if args.torch_compile else None
        self._causal_loss = self._compiled(ForCausalLMLoss) if args.torch_compile else None
        self.add_callback(_Stages(self))

    # ---- the stages

    def begin(self, resumed: dict[str, Any] | None) -> None:
        """Called when training begins, with what a checkpoint remembers of the run, or None."""
        check_recomputing(self._unwrapped)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            check_sharded(self.plan, self.method, self.args, self._unwrapped.config.lte.get("grouped", True))
        self._forget()
        keep_dtypes(cast(nn.Module, self.model_wrapped))
        if resumed:
            plan = [*astuple(self.plan)]
            if resumed.get("plan", plan) != plan:
                raise ValueError(
                    f"the checkpoint's run has {resumed['plan']} steps dense, soft and hard, and this one {plan}: "
                    "resume with the same number of steps and fractions"
                )
            self.eta = resumed["eta"]
            self.controller.integral, self.controller.gap = resumed["integral"], resumed.get("gap", 0.0)
            self._switch(resumed["stage"])
            if self.stage != "dense":
                self._unwrapped.config.lte.pop("grouped", None)  # the checkpoint's neurons are
                if self._distils and self.state.global_step < self.plan.total:
                    self.teacher = load_teacher(
                        self._folder / TEACHER, self._unwrapped, self._compilation, self._teacher_dtype
                    )
        try_out(self, teacher=self._distils and not resumed)

    def _forget(self) -> None:
        """What a run knows before its first step, though the trainer may have run before."""
        self.stage: Stage | None = None
        self.teacher: nn.Module | None = None
        self.eta: float | Tensor = self.args.eta or 0.0
        self.controller = SparsityController(self.args.target_sparsity or 0.0, ramp=self.args.sparsity_ramp)
        self.step_log = StepLog()

    def begin_step(self, step: int) -> None:
        """Called before each optimizer step: change the stage when it is time, sharpen the routers."""
        stage, self.progress = self.plan.at(step)
        if stage != self.stage:
            self._enter(stage)
        self._begin_graphs()
        if stage == "soft" and self._linear:
            ramped = min(1.0, self.progress / cast(float, self.args.ramp))
            sharpen_(self._layers.values(), cast(float, self.args.temperature) ** ramped)

    def end_step(self) -> None:
        """Called after each optimizer step: move eta toward the target (soft), now and then the thresholds (hard)."""
        if self.stage == "dense":
            return
        sparsity = self.step_log.end_step()
        if self.args.target_sparsity is not None and self.stage == "soft" and self._linear:
            if self.state.global_step % max(_APART, self.plan.soft // _COMPARISONS) == 0:
                self._compare(sparsity)
            self.eta = self.controller.step(sparsity, self.progress)
        if self.stage == "hard":
            every = max(1, self.plan.hard // _CALIBRATIONS)
            done = self.state.global_step - self.plan.dense - self.plan.soft
            if done % every == 0 or self.state.global_step == self.plan.total:
                self._calibrate()

    def memory(self) -> dict[str, Any]:
        """What a checkpoint has to remember to go on."""
        controller = self.controller
        return {
            "manifest": True,
            "stage": self.stage,
            "plan": [*astuple(self.plan)],
            "eta": float(self.eta),
            "integral": float(controller.integral),
            "gap": float(controller.gap),
        }

    @torch.no_grad()
    def _enter(self, stage: Stage) -> None:
        """Begin a stage for the first time (not on resuming inside it)."""
        before = self.stage
        model = self._unwrapped
        if stage == "soft" or (stage == "hard" and not self.plan.soft):
            if before == "dense":
                self.stop_if_diverged()
            if before == "dense" or not model.config.lte.get("grouped", True):
                regroup_(model, self.method, self._batches(self.train_dataset, self.args.seed))
            if self._distils:
                plain = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
                kept_in = self._folder / TEACHER if self.args.should_save else None  # for resuming
                self.teacher = make_teacher(plain, kept_in, self._compilation, self._teacher_dtype)
            start_routers_(model, self.method, self._batches(self.train_dataset, self.args.seed), self.args)
        if stage == "hard" and self._linear:
            for layer in self._layers.values():
                layer.router.fold_temperature()
        goes_on = before == "soft" and not self.args.restart_hard
        if before is not None and not goes_on and self.optimizer is not None:
            self.optimizer.state.clear()  # pyright: ignore[reportAttributeAccessIssue]
        self._switch(stage)
        if stage == "hard":
            self._calibrate()
        logger.info("stage %s begins at step %d of %s", stage, self.state.global_step, model.__class__.__name__)

    def _switch(self, stage: Stage) -> None:
        """The settings of a stage, without its once-only actions."""
        self.stage = stage
        set_stage_(self._unwrapped, stage, train_bias=self.args.router_bias != 0)

    def _calibrate(self) -> None:
        """Move the thresholds so that rows which are not trained on have the target's sparsity."""
        if self.calibration_dataset is None or self.args.target_sparsity is None:
            return
        self.stop_if_diverged()
        batches = self._batches(self.calibration_dataset)
        with self.accelerator.autocast():
            move_thresholds_(self._unwrapped, self.method, batches, self.args.target_sparsity)

    @torch.no_grad()
    def _compare(self, sparsity: Tensor) -> None:
        """Tell the controller by how much rows that are not trained on are sparser than those of the last step."""
        if self.calibration_dataset is None:
            return
        model = self._unwrapped
        with evaluating(model), self.accelerator.autocast(), track_sparsity(model) as meter:
            for batch in self._batches(self.calibration_dataset):
                model(**self._read_by_model(batch))
        self.controller.gap = cast(Tensor, reduce(meter.measured()[0], reduction="mean")) - sparsity

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
            self._begin_graphs()
            yield cast(dict[str, Any], self._prepare_inputs(batch))

    # ---- what Trainer asks for

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; ``resume_from_checkpoint=True`` takes the last checkpoint that is whole.

        With no such checkpoint the run starts from its beginning. A run that is finished is loaded, and not trained.

        Raises:
            ValueError: the checkpoint is of a run with another model, other data or other options, or damaged; the
                output folder holds checkpoints and is neither resumed nor to be overwritten, or another run uses it.
        """
        check_callbacks(self.callback_handler.callbacks, self.args)
        first = self.args.process_index == 0
        with ExitStack() as held:

            def begin() -> tuple[Path | None, dict[str, Any]]:
                held.enter_context(alone_in(self._folder))
                identity = self._identity()
                model = getattr(self._unwrapped.config, "_name_or_path", "")
                return begin_run(self._folder, identity, resume_from_checkpoint, self.args.overwrite, model), identity

            checkpoint, self.identity = agreed(first, begin)
            return self._train(checkpoint, *args, **kwargs)

    def _train(self, checkpoint: Path | None, *args: Any, **kwargs: Any) -> Any:
        mode = self._unwrapped.config.lte.get("mode", "dense")
        if mode != "dense" and not checkpoint and self.args.recipe != "dense":
            logger.warning(
                "the model is in mode %s, trained already: its weights are kept, but its routers and thresholds start "
                "anew; to train it as it is, take transformers.Trainer",
                mode,
            )
        result = super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
        # mixed precision wrapped forward in autocast; the trained model is to run as it is, and optimised at full speed
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self._use_cache is not None:  # Trainer turns the KV cache off; the trained model is to generate with it
            self._unwrapped.config.use_cache = self._use_cache
        return result

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint's run must have in common with this one. The model is looked at before it is trained."""
        if self._model_identity is None:
            self._model_identity = model_identity(self._unwrapped)
        datasets = {"train_dataset": self.train_dataset, "calibration_dataset": self.calibration_dataset}
        if self.args.load_best_model_at_end:
            datasets["eval_dataset"] = self.eval_dataset
        return run_identity(self.args, self._model_identity, datasets, self.data_collator)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As ``Trainer``'s, which trains at least one step: of a run that is finished none."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optimizer = super().create_optimizer(*args, **kwargs)
            router = [layer.router for layer in self._layers.values()]
            ids = {id(p) for one in router for p in one.parameters()}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in ids]
            for parameters, decay in (
                ([p for one in router for p in one.parameters() if p.ndim == 2], self.args.router_weight_decay),
                ([p for one in router for p in one.parameters() if p.ndim < 2], 0.0),
            ):
                optimizer.add_param_group(
                    {"params": parameters, "lr": self.args.router_learning_rate, "weight_decay": decay}
                )
        return cast(torch.optim.Optimizer, self.optimizer)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        dense, hard = self.args.dense_fraction, cast(float, self.args.hard_fraction)
        if self.method.learns or self.args.recipe == "dense":
            self.plan = StagePlan.split(num_training_steps, dense, hard)
        else:
            self.plan = StagePlan.without_soft(num_training_steps, dense)
        if self.lr_scheduler is None:
            factor = self.plan.lr_lambda(
                self.args.lr_scheduler_type,
                self.args.get_warmup_steps,
                cast(dict[str, Any], self.args.lr_scheduler_kwargs or {}),
                self.args.dense_learning_rate_factor,
                cast(bool, self.args.restart_hard),
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
        if not model.training or self.stage not in ("soft", "hard"):
            with causal_loss(model, self._causal_loss if model.training else None):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        parts = self.current_gradient_accumulation_steps if scaled else 1  # the task loss is a share of so many's
        told = self._teach(inputs)
        distilled = None
        if told is not None and self.args.distillation_weight:
            distilled = DistilledLoss(told["logits"], self.args.distillation_weight, self._mix_rows)
        with (
            record_scores(self._unwrapped) as recording,
            record_balance(self._layers if self.stage == "soft" else {}) as balance,
            causal_loss(model, distilled or self._causal_loss),
        ):
            made: Any = super().compute_loss(model, {**inputs, **self._wanted}, True, num_items_in_batch)
        loss, outputs = made
        task = loss
        if distilled is not None:
            logits, labels = outputs["logits"], inputs.get("labels")
            mask = predicts(labels, logits, self._causal)
            num_items, scale = (num_items_in_batch, self._ranks_scale) if scaled else (None, 1)
            problem = getattr(self._unwrapped.config, "problem_type", None)
            loss, task, kl = distilled.mix(loss, logits, mask, num_items, scale, problem)
            self.step_log.note("distillation_loss", kl * parts)
        self.step_log.note("task_loss", task * parts)
        extra = self._router_loss(recording, balance)
        if told is not None and self._wanted:
            error = block_error(outputs, told, recording.masks)
            self.step_log.note("feature_distillation_loss", error)
            extra = extra + cast(float, self.args.feature_distillation_weight) * error
        loss = loss + extra / parts  # a mean over this micro-batch
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _teach(self, inputs: dict[str, Any]) -> Any:
        """What the teacher says of a batch; None where there is none."""
        if self.teacher is None:
            return None
        with self.accelerator.autocast():
            return self.teacher(**self._read_by_model(inputs), **self._wanted)

    def _read_by_model(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Labels only where the decoder reads them: else they are for a loss, which nobody wants of this pass."""
        return {name: value for name, value in inputs.items() if name != "labels" or self._encoder_decoder}

    def _router_loss(self, recording: Recording, balance: Balance) -> Tensor:
        """What routers are trained for beside the task: a mixture's balance, or LTE's losses by their weights."""
        if not self._linear:
            return mixture_loss(recording, balance, self._layers, self.step_log)
        efficiency, separability = lte_losses(
            recording, self._layers, self.args.separability_floor, self.step_log, self._measure_scores
        )
        if self.stage == "hard":
            return efficiency.new_zeros(())
        loss, weight = self.eta * efficiency, cast(float, self.args.separability_weight)
        return loss + weight * separability if weight else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As ``Trainer``'s, but parameters are counted once: it takes a millisecond or more of every step."""
        tokens = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        if tokens is None:
            return super().floating_point_ops(inputs)
        if self._flops_per_token is None:
            self._flops_per_token = super().floating_point_ops(inputs) // tokens.numel()
        return self._flops_per_token * tokens.numel()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and (noted := self.step_log.entry()):
            eta = {"eta": float(self.eta)} if self._linear else {}
            logs = {**logs, **eta, **noted}
        super().log(logs, *args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self._begin_graphs()
        made = super().prediction_step(*args, **kwargs)
        return recursively_apply(torch.clone, made) if self._has_graphs else made

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
        with track_sparsity(self._unwrapped) as meter:
            output = super().evaluation_loop(*args, **kwargs)
        cast(dict[str, float], output.metrics)[f"{prefix}_sparsity"] = meter.overall
        return output

    def _load_callback_state(self) -> None:
        """As ``Trainer``'s, for the others' callbacks: it would make a new one of ours, which belongs to no trainer."""
        callbacks = cast(dict[str, Any], self.state.stateful_callbacks)
        ours = callbacks.pop(_Stages.__name__, None)
        super()._load_callback_state()
        if ours is not None:
            callbacks[_Stages.__name__] = ours

    # ---- small things

    @property
    def _folder(self) -> Path:
        return Path(cast(str, self.args.output_dir))  # set by TrainingArguments where it was not given

    @property
    def _unwrapped(self) -> Any:
        return self._found_in_model[0]

    @property
    def _layers(self) -> dict[str, Any]:
        return self._found_in_model[1]

    @property
    def _found_in_model(self) -> tuple[Any, dict[str, Any]]:
        """The model without wrappers, and its sparse layers. Kept: each means a look at all modules, at every step."""
        if self._found[0] is not self.model:
            plain = self.accelerator.unwrap_model(self.model)
            self._found = self.model, plain, sparse_layers(plain)
        return self._found[1:]

    @property
    def _distils(self) -> bool:
        return bool(self.args.distillation_weight or self.args.feature_distillation_weight)

    @property
    def _teacher_dtype(self) -> torch.dtype | None:
        """Without gradients and an optimizer there is nothing that fp32 would be kept for, and bf16 is read faster."""
        return torch.bfloat16 if self.args.bf16 else None

    @property
    def _encoder_decoder(self) -> bool:
        return getattr(self._unwrapped.config, "is_encoder_decoder", False)

    @property
    def _wanted(self) -> dict[str, bool]:
        """What student and teacher are asked for beyond logits."""
        return {"output_hidden_states": True} if self.args.feature_distillation_weight else {}

    @property
    def _ranks_scale(self) -> int:
        """``num_items_in_batch`` counts all ranks, gradients are averaged over them."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    @property
    def _compilation(self) -> dict[str, Any] | None:
        """Options of ``torch.compile``; None where nothing is compiled."""
        state: Any = self.accelerator.state
        return state.dynamo_plugin.to_kwargs() if self.args.torch_compile else None

    def _begin_graphs(self) -> None:
        """What CUDA graphs put out until now may be overwritten. Torch left to itself says so at every block of a pass
        without gradient, the teacher's."""
        if self._has_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    @property
    def _has_graphs(self) -> bool:
        return self.args.torch_compile and self.args.torch_compile_mode in ("reduce-overhead", "max-autotune")

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Where blocks are compiled, so is what lies between them."""
        return function if self._compilation is None else torch.compile(function, **self._compilation)


class _Stages(TrainerCallback, ExportableState):
    """Tells the trainer where training is, and keeps its memory in checkpoints."""

    def __init__(self, trainer: LTETrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        callbacks = cast(dict[str, Any], state.stateful_callbacks)
        saved = callbacks.get(type(self).__name__) if state.global_step else None
        self.trainer.begin(saved["attributes"] if isinstance(saved, dict) else None)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.begin_step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.end_step()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": self.trainer.memory()}
