"""The time of a training step: ``LTETrainer`` itself, with a clock at the end of every step."""

import statistics
import time
from itertools import pairwise
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lte.data.batches import PackedBlocks
from lte.training.arguments import LTETrainingArguments
from lte.training.trainer import LTETrainer


def step_seconds(model: Any, args: LTETrainingArguments, dataset: PackedBlocks, warmup: int) -> float:
    """Return the median seconds of an optimizer step with the schedule of ``args``, including the data loader.

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
    clock = _Clock(args.device)
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.train()
    return statistics.median(clock.seconds()[warmup:])


class _Clock(TrainerCallback):
    """Marks the end of each step: on CUDA by events, which the host does not wait for."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds of each step except the first."""
        if self._cuda:
            torch.cuda.synchronize()
            return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._marks)]
        return [after - before for before, after in pairwise(self._marks)]
