"""`SparsityMeter`: the sparsity of neurons, and of the inputs of linear layers, over forward passes."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lte.core.accounting import count_active
from lte.core.selection import threshold
from lte.modules.sparse_ffn import Selecting, inputs_of


class SparsityMeter:
    """Counts active neurons, and zeros among the inputs of linear layers, over forward passes.

    Args:
        linears: the linear layers by name.
    """

    def __init__(self, linears: Mapping[str, nn.Module] | None = None) -> None:
        self._active: dict[str, Tensor] = {}
        self._total: dict[str, Tensor] = {}
        self._linears = linears or {}
        self._zeros: dict[str, Tensor | int] = {}
        self._inputs: dict[str, Tensor | int] = {}

    def add(self, layers: dict[str, Selecting], stacked: list[tuple[list[str], Tensor, Tensor | None]]) -> None:
        """Count a forward pass. ``stacked`` is the result of :meth:`Recording.stacked`."""
        for names, scores, mask in stacked:
            self.add_counts(names, *count_active(threshold(scores, layers[names[0]].tau), mask))

    def add_counts(self, names: list[str], active_L: Tensor, total: Tensor) -> None:
        """Add the result of :func:`~lte.core.accounting.count_active` for some layers."""
        for name, active in zip(names, active_L.unbind(), strict=True):
            self._active[name] = self._active[name] + active if name in self._active else active
            self._total[name] = self._total[name] + total if name in self._total else total

    def add_zeros(self, name: str, zeros_T: Tensor, mask_T: Tensor | None) -> None:
        """Count a pass of a linear layer: each token's number of zeros. Tokens with ``mask_T`` = 0 do not count."""
        real_T = torch.ones_like(zeros_T) if mask_T is None else mask_T.to(zeros_T.device).ne(0).long()
        inputs = inputs_of(self._linears[name]) * real_T.sum()
        self._zeros[name] = self._zeros.get(name, 0) + (zeros_T * real_T).sum()
        self._inputs[name] = self._inputs.get(name, 0) + inputs

    def include(self, other: "SparsityMeter") -> None:
        """Add what another meter of the same model has counted."""
        for mine, theirs in ((self._active, other._active), (self._total, other._total)):
            mine |= {name: mine.get(name, 0) + count for name, count in theirs.items()}
        for mine, theirs in ((self._zeros, other._zeros), (self._inputs, other._inputs)):
            mine |= {name: mine.get(name, 0) + count for name, count in theirs.items()}

    def counts(self) -> Tensor:
        """Return active and all neurons of each layer, ``[2, L]``, on the device, without waiting for it."""
        return torch.stack([torch.stack(list(one.values())) for one in (self._active, self._total)])

    def measured(self) -> tuple[Tensor, Tensor]:
        """Return sparsity overall (a scalar) and of each layer ``[L]``, on the device."""
        active_L, total_L = self.counts()
        return 1 - active_L.sum() / total_L.sum(), 1 - active_L / total_L

    @property
    def by_layer(self) -> list[float]:
        """Sparsity of each layer, in order. Empty before the first forward pass."""
        return self.measured()[1].tolist() if self._active else []

    @property
    def overall(self) -> float:
        """Fraction of inactive neurons, mean over tokens and layers; NaN before the first forward pass."""
        return self.measured()[0].item() if self._active else float("nan")

    @property
    def by_linear(self) -> dict[str, float]:
        """The fraction of inputs that were 0, by the name of the linear layer. Empty before the first forward pass."""
        return {name: float(zeros / self._inputs[name]) for name, zeros in self._zeros.items()}

    @property
    def attention_sparsity(self) -> float:
        """The fraction of the linear layers' weights that zeros leave unread; 0 if no layer applied its threshold."""
        weights = {name: linear.get_parameter("weight").numel() for name, linear in self._linears.items()}
        unread = sum(share * weights[name] for name, share in self.by_linear.items())
        return unread / max(1, sum(weights.values()))
