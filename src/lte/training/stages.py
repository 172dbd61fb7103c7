"""Leads a run through its stages, as a callback of ``Trainer``, which saves the callback's state in checkpoints."""

import logging
from dataclasses import astuple
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lte.surgery.adapters import Adapters
from lte.surgery.experts import regroup_
from lte.surgery.stages import Stage, StagePlan
from lte.training.checks import check_sharded
from lte.training.distiller import FrozenTeacher, keep_dtypes
from lte.training.optimizers import restart_
from lte.training.preflight import try_out
from lte.training.recomputing import check_recomputing

if TYPE_CHECKING:
    from lte.training.trainer import LTETrainer

logger = logging.getLogger(__name__)

CALIBRATIONS = 4  # in the hard stage, evenly spaced: the inputs of frozen routers change while the model trains


class _Stages(TrainerCallback, ExportableState):  # its name in checkpoints
    """Changes the stage at the right step. The method's :class:`~lte.surgery.training.Training` does the work.

    Attributes:
        plan: the stages of the run.
        stage: the current one; None before the first step.
        progress: through the stage, in [0, 1].
    """

    def __init__(self, trainer: "LTETrainer"):
        self.trainer = trainer
        self.plan = StagePlan(0, 0, 0)
        self.stage: Stage | None = None
        self.progress = 0.0

    def begin(self, resumed: dict[str, Any] | None) -> None:
        """Called when training begins, with the state from a checkpoint or None."""
        trainer, model = self.trainer, self.trainer.plain
        check_recomputing(model)
        check_sharded(trainer)
        self.stage, trainer.distiller.teacher = None, None
        trainer.training.begin(model, self.plan, trainer.compilation)
        keep_dtypes(cast(nn.Module, trainer.model_wrapped))
        if resumed:
            self._go_on(resumed)
        try_out(trainer, teacher=trainer.args.distils and not resumed and trainer.adapters is None)

    def _go_on(self, resumed: dict[str, Any]) -> None:
        trainer, plan = self.trainer, [*astuple(self.plan)]
        if resumed.get("plan", plan) != plan:
            raise ValueError(
                f"the checkpoint's run has {resumed['plan']} steps dense, soft and hard, and this one {plan}: "
                "resume with the same number of steps and fractions"
            )
        trainer.training.load(resumed)
        self.stage = stage = cast(Stage, resumed["stage"])
        trainer.training.set_stage(stage)
        if stage != "dense":
            trainer.plain.config.lte.pop("grouped", None)  # the checkpoint's neurons are grouped
            if trainer.args.distils and trainer.state.global_step < self.plan.total:
                if trainer.adapters is not None:
                    self._share_weights(trainer.adapters)
                else:
                    trainer.distiller.load(trainer.folder, trainer.plain)

    def begin_step(self, step: int) -> None:
        """Called before each optimizer step. Change the stage at the right step."""
        stage, self.progress = self.plan.at(step)
        if stage != self.stage:
            self.enter(stage)
        self.trainer.compilation.begin_pass()
        self.trainer.training.before_step(stage, self.progress)

    def end_step(self) -> None:
        """Called after each optimizer step. In the hard stage, set the thresholds at some steps."""
        if self.stage in (None, "dense"):
            return
        trainer, step = self.trainer, self.trainer.state.global_step
        sparsity = trainer.training.log.end_step()
        trainer.training.after_step(self.stage, self.progress, step, sparsity, trainer.rows)
        if self.stage == "hard":
            done = step - self.plan.dense - self.plan.soft
            if done % max(1, self.plan.hard // CALIBRATIONS) == 0 or step == self.plan.total:
                self.calibrate()

    @torch.no_grad()
    def enter(self, stage: Stage) -> None:
        """Begin a stage. Not called if a run is resumed inside the stage."""
        trainer, model, before = self.trainer, self.trainer.plain, self.stage
        if self.plan.begins_sparse(stage):
            with trainer.aside():
                self._begin_sparse(before)
                trainer.training.enter(stage, trainer.rows)
        else:
            trainer.training.enter(stage, trainer.rows)
        goes_on = before == "soft" and not trainer.args.restart_hard
        if before is not None and not goes_on and trainer.optimizer is not None:
            restart_(trainer.optimizer, trainer.first_state)
        self.stage = stage
        if stage == "hard":
            self.calibrate()
        logger.info("stage %s begins at step %d of %s", stage, trainer.state.global_step, type(model).__name__)

    def _begin_sparse(self, before: Stage | None) -> None:
        """Group neurons by the weights of the dense stage, and make its model the teacher."""
        trainer, model, adapters = self.trainer, self.trainer.plain, self.trainer.adapters
        if before == "dense":
            trainer.stop_if_diverged()
            if adapters is not None:
                adapters.absorb()
        if before == "dense" or not model.config.lte.get("grouped", True):
            orders = regroup_(model, trainer.method, trainer.rows.training())
            if adapters is not None:
                adapters.orders = orders
        if not trainer.args.distils:
            return
        if adapters is not None:
            self._share_weights(adapters)
        else:
            plain = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
            trainer.distiller.make(plain, trainer.folder if trainer.args.should_save else None)

    def _share_weights(self, adapters: Adapters) -> None:
        """Make the frozen weights, which the student has too, the teacher."""
        whole = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped, keep_torch_compile=True)
        self.trainer.distiller.teacher = FrozenTeacher(cast(nn.Module, whole), self.trainer.plain, adapters)

    def calibrate(self) -> None:
        """Move the thresholds so that held-out rows have the target's sparsity."""
        trainer = self.trainer
        if trainer.rows.held_out is not None and trainer.training.target is not None:
            trainer.stop_if_diverged()
            trainer.training.calibrate(trainer.rows)

    # ---- methods that Trainer calls

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        callbacks = cast(dict[str, Any], state.stateful_callbacks)
        saved = callbacks.get(type(self).__name__) if state.global_step else None
        self.begin(saved["attributes"] if isinstance(saved, dict) else None)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin_step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.end_step()

    def state(self) -> dict[str, Any]:
        plan = [*astuple(self.plan)]
        memory = {"manifest": True, "stage": self.stage, "plan": plan, **self.trainer.training.state()}
        return {"args": {}, "attributes": memory}
