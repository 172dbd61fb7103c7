"""A clock at the end of every training step."""

import time
from itertools import pairwise
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lte.surgery.stages import Stage


class StepClock(TrainerCallback):
    """Marks the end of each step: on CUDA by events, which the host does not wait for.

    Attributes:
        begin: the seconds in which stages began, if :meth:`timed` wraps what begins them.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self.begin = 0.0

    def timed(self, enter: Any) -> Any:
        """Return the function that begins a stage, with its seconds added to ``begin``."""

        def timed(stage: Stage) -> None:
            start = time.perf_counter()
            enter(stage)
            if self._cuda:
                torch.cuda.synchronize()
            self.begin += time.perf_counter() - start

        return timed

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
