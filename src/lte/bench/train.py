"""The time of a training step: ``LTETrainer`` itself, with a clock."""

import statistics
from dataclasses import dataclass
from typing import Any

from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lte.data.batches import PackedBlocks
from lte.training.arguments import LTETrainingArguments
from lte.training.step_clock import StepClock
from lte.training.trainer import LTETrainer


@dataclass(frozen=True)
class StepTime:
    """The seconds of a run.

    Attributes:
        step: the median of an optimizer step, including the data loader.
        begin: of the start of all stages together: grouping neurons, fitting routers.
    """

    step: float
    begin: float


def step_seconds(model: Any, args: LTETrainingArguments, dataset: PackedBlocks, warmup: int) -> StepTime:
    """Run the schedule of ``args`` and return its times.

    Args:
        model: sparse, in any mode. It is trained.
        args: the arguments of a run of ``max_steps``.
        dataset: rows to train on, and to calibrate on if the schedule does.
        warmup: number of first steps that do not count.
    """
    trainer = LTETrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        calibration_dataset=dataset.head(1),
        data_collator=dataset.collator,
    )
    clock = StepClock(args.device)
    trainer.stages.enter = clock.timed(trainer.stages.enter)
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.train()
    return StepTime(statistics.median(clock.seconds()[warmup:]), clock.begin)
