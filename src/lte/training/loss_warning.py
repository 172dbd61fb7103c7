"""Warns early if training makes the model worse."""

import logging
import math
from statistics import fmean, pstdev
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lte.training.stages import _Stages

logger = logging.getLogger(__name__)

_ENTRIES = 4  # of the log, for a mean
_WORSE = 0.1  # of the loss in the dense stage; it falls in a good run
_SPARSE = 0.4  # of the loss of a sparse model: 1.5 times the perplexity of the dense model


class LossWarning(TrainerCallback):
    """Warns once in each stage if the loss of the last entries of the log is too high.

    In the dense stage it is compared with the first entry, later with the end of the dense stage. The labels' loss is
    compared, without the teacher's part. Two standard errors of the mean are allowed in addition.
    """

    def __init__(self, stages: _Stages) -> None:
        self.stages = stages
        self.warned: set[str] = set()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.warned.clear()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        stage = self.stages.stage
        if stage is None or stage in self.warned or not state.is_world_process_zero:
            return
        losses: dict[bool, list[float]] = {True: [], False: []}  # by whether the stage is the dense one
        for entry in state.log_history:
            if "loss" in entry:
                losses[entry["step"] <= self.stages.plan.dense].append(entry.get("task_loss", entry["loss"]))
        dense, recent = losses[True], losses[stage == "dense"][-_ENTRIES:]
        if len(dense) <= (_ENTRIES if stage == "dense" else 0) or len(recent) < _ENTRIES:
            return
        before, bound = (dense[0], _WORSE) if stage == "dense" else (fmean(dense[-_ENTRIES:]), _SPARSE)
        if fmean(recent) - before > bound + 2 * pstdev(recent) / math.sqrt(len(recent)):
            self.warned.add(stage)
            logger.warning(
                "step %d: the loss is %.2f in the %s stage, and was %.2f %s: a lower learning rate or a lower target "
                "sparsity may help",
                state.global_step,
                fmean(recent),
                stage,
                before,
                "at its start" if stage == "dense" else "at the end of the dense stage",
            )
