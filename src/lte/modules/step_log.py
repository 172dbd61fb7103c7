"""What is logged of training steps: numbers that each noted, and its sparsity; nothing waits for them until then."""

from collections import deque
from typing import cast

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from lte.modules.recording import SparsityMeter

_MOST = 10_000


class StepLog:
    """Collects between two entries of the log.

    Attributes:
        noted: what was noted since the last entry, by name; of a run that never logs, the last of it.
        meter: counts the active neurons of the step under way.
    """

    def __init__(self) -> None:
        self.noted: dict[str, deque[Tensor]] = {}
        self.meter = SparsityMeter()
        self._last: Tensor | float = 0.0  # sparsity, overall and by layer

    def note(self, name: str, value: Tensor) -> None:
        """Add a number to those that the next entry has the mean of."""
        self.noted.setdefault(name, deque(maxlen=_MOST)).append(value.detach().float())

    def end_step(self) -> Tensor:
        """Note the step's sparsity, over all ranks, and that of each layer; gives the former.

        A step of padding alone has that of the step before.
        """
        counts_2L = cast(Tensor, reduce(self.meter.counts(), reduction="sum"))
        active, total = torch.cat([counts_2L.sum(1, keepdim=True), counts_2L], 1)
        self._last = torch.where(total > 0, 1 - active / total, self._last)
        sparsity, *by_layer = self._last.unbind()
        self.note("sparsity", sparsity)
        for index, share in enumerate(by_layer):
            self.note(f"sparsity/layer_{index:02d}", share)
        self.meter = SparsityMeter()
        return sparsity

    def entry(self) -> dict[str, float]:
        """The mean of all that was noted, over all ranks, and begin anew; empty where nothing was."""
        if not self.noted:
            return {}
        device = PartialState().device
        means = torch.stack([torch.stack(list(values)).mean().to(device) for values in self.noted.values()])
        names, self.noted = list(self.noted), {}
        return dict(zip(names, cast(Tensor, reduce(means, reduction="mean")).tolist(), strict=True))
