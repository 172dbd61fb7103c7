"""Collects the values of training steps for the log. The device is not waited for until they are logged."""

from collections import deque
from typing import cast

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from lte.modules.sparsity_meter import SparsityMeter

_MOST = 10_000


class StepLog:
    """Collects values between two entries of the log.

    Attributes:
        noted: the values since the last entry, by name. A run that never logs keeps only the last of them.
        meter: counts the active neurons of the current step.
    """

    def __init__(self) -> None:
        self.noted: dict[str, deque[Tensor]] = {}
        self.meter = SparsityMeter()
        self._last: Tensor | float = 0.0  # sparsity, overall and by layer

    def note(self, name: str, value: Tensor) -> None:
        """Add a number. The next entry of the log has the mean of these numbers."""
        self.noted.setdefault(name, deque(maxlen=_MOST)).append(value.detach().float())

    def end_step(self) -> Tensor:
        """Note the sparsity of the step, over all ranks and of each layer. Return the sparsity of all layers, a scalar.

        A step with only padding has the sparsity of the previous step.
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
        """Return the means of all values, over all ranks, and start again. Return {} if there are no values."""
        if not self.noted:
            return {}
        device = PartialState().device
        means = torch.stack([torch.stack(list(values)).mean().to(device) for values in self.noted.values()])
        names, self.noted = list(self.noted), {}
        return dict(zip(names, cast(Tensor, reduce(means, reduction="mean")).tolist(), strict=True))
