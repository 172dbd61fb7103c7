"""Sets thresholds on data in one pass, so that a given share of a layer's values is below them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lte.core.sampling import stride_for
from lte.modules.input_threshold import CUT
from lte.surgery.activations import Wanted, watch_inputs

_SAMPLE = 1 << 18  # values of a layer for its cut: the quantile is exact to 0.1 %


def sample(values_TI: Tensor, tokens: int) -> Tensor:
    """Return some values of every token, in turn, because tokens differ much."""
    width = values_TI.shape[-1]
    return values_TI.flatten()[:: stride_for(tokens * width, _SAMPLE, width)].clone()  # a view would keep all values


@torch.no_grad()
def set_cuts_(
    model: PreTrainedModel,
    wanted: Sequence[Wanted],
    shares: Sequence[float],
    batches: Iterable[dict[str, Tensor]],
    tokens: int,
) -> None:
    """Set the buffer ``cut`` of modules to the quantiles of their values on ``tokens`` tokens of ``batches``.

    A cut is set just before its layer runs, so later layers see the values that pass the cut. A cut is the quantile of
    all batches up to then, so it becomes more exact with each batch.

    Args:
        wanted: modules, and the :func:`sample` of their values.
        shares: the share of each module's values that are at its cut or below. If it is less than one value, the cut
            does not change.

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
