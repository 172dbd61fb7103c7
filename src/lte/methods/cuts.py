"""Thresholds that leave a share of a layer's values below them, set on data in one pass."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lte.core.sampling import stride_for
from lte.modules.input_threshold import CUT
from lte.surgery.activations import Wanted, watch_inputs

_SAMPLE = 1 << 18  # values of a layer that its cut is taken from: a quantile good to 0.1 %


def sample(values_TI: Tensor, tokens: int) -> Tensor:
    """Of every token some values, in turn, where there are ``tokens`` tokens: they differ much."""
    width = values_TI.shape[-1]
    return values_TI.flatten()[:: stride_for(tokens * width, _SAMPLE, width)].clone()  # a view would keep them all


@torch.no_grad()
def set_cuts_(
    model: PreTrainedModel,
    wanted: Sequence[Wanted],
    shares: Sequence[float],
    batches: Iterable[dict[str, Tensor]],
    tokens: int,
) -> None:
    """Set the buffer ``cut`` of modules to the quantiles of their values on ``tokens`` tokens of ``batches``.

    One layer after the other: a cut is set just before its layer runs, so that the layers behind it see what it lets
    through. It is the quantile of the batches up to then, and settles as they come.

    Args:
        wanted: modules, and what :func:`sample` gives of their values.
        shares: of each module's values, the share at its cut or below. Where that is less than one value the cut stays.

    Raises:
        ValueError: no batch, or nothing but padding.
    """
    seen: list[list[Tensor]] = [[] for _ in wanted]

    def look(index: int, rows: Tensor) -> None:
        _, module, values_of = wanted[index]
        seen[index].append(values_of(rows))
        values = torch.cat(seen[index])
        if rank := round(shares[index] * len(values)):
            module.get_buffer(CUT).copy_(values.float().kthvalue(rank).values)

    watch_inputs(model, [(name, module) for name, module, _ in wanted], batches, look, tokens)
