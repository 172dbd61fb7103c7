"""Sets thresholds on data in one pass, so that a given share of a layer's values is below them."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lte.core.sampling import stride_for
from lte.modules.input_threshold import CUT
from lte.surgery.activations import Wanted, check_inputs_are_tokens, watch_inputs
from lte.surgery.sites import check_linears

_SAMPLE = 1 << 18  # values of a layer for its cut: the quantile is exact to 0.1 %


def check_inputs(model: PreTrainedModel, who: str) -> None:
    """Raise ValueError unless inputs of the linear layers of all blocks can have thresholds.

    Args:
        who: the conversion or the option, which begins the message.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(f"{who} is for models with one stack of blocks, not for an encoder-decoder")
    check_inputs_are_tokens(model.config)
    check_linears(model, model.config.model_type)


def sizes_of_inputs(linears: Mapping[str, nn.Module], tokens: int) -> list[Wanted]:
    """Return the linear layers and their values for :func:`set_cuts_`: a :func:`sample` of the sizes of inputs."""
    return [(name, linear, lambda x_TI: sample(x_TI.abs(), tokens)) for name, linear in linears.items()]


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
