"""One-shot pruning of single weights, by Wanda (Sun et al., arXiv 2306.11695) or size: no routers, a stock model."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lte.core.selection import top_k
from lte.modules.tensor_parallel import check_not_shared
from lte.surgery.activations import check_inputs_are_tokens, first_tokens, record_inputs
from lte.surgery.linears import rows_of
from lte.surgery.sites import LinearSite, check_linears, linear_sites
from lte.surgery.teal import SECTION as TEAL

SECTION = "pruning"
"""What a config calls how the model was pruned; no code needs it to load the model."""


@dataclass(frozen=True)
class MagnitudeConfig:
    """How to prune by size: of each matrix the weights with the least ``|w|``.

    Attributes:
        target_sparsity: fraction of the weights to make 0, in every linear layer of the blocks.
        pattern: ``N:M`` keeps N of every M consecutive inputs, e.g. 2:4 or 4:8; None, wherever they are.

    Raises:
        ValueError: an option outside its range.
    """

    name: ClassVar[str] = "magnitude"

    target_sparsity: float = 0.5
    pattern: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.target_sparsity < 1:
            raise ValueError(
                f"target_sparsity is {self.target_sparsity}, but it is the fraction of weights that become 0: "
                "between 0 and 1, e.g. 0.5"
            )
        if self.pattern is not None and not 0 < self.kept_of[0] < self.kept_of[1]:
            raise ValueError(f"pattern is {self.pattern!r}, but it keeps N of every M weights, e.g. 2:4")
        if self.pattern is not None and abs(self.target_sparsity - 1 + self.kept_of[0] / self.kept_of[1]) > 1e-3:
            raise ValueError(
                f"pattern {self.pattern} is a sparsity of {1 - self.kept_of[0] / self.kept_of[1]:g}, "
                f"but target_sparsity is {self.target_sparsity:g}: make them one"
            )

    @property
    def kept_of(self) -> tuple[int, int]:
        """N and M of the pattern; zeros if it is none."""
        kept, _, group = (self.pattern or "").partition(":")
        return (int(kept), int(group)) if kept.isdecimal() and group.isdecimal() else (0, 0)


@dataclass(frozen=True)
class WandaConfig(MagnitudeConfig):
    """How to prune by Wanda: of each output's weights those with the least ``|w| * |x|``, x its input on data.

    Attributes:
        target_sparsity: fraction of the weights to make 0, of every output of every linear layer of the blocks.
        pattern: ``N:M`` keeps N of every M consecutive inputs, e.g. 2:4 or 4:8; None, wherever they are.
        tokens: how many tokens of the data to look at.

    Raises:
        ValueError: an option outside its range.
    """

    name: ClassVar[str] = "wanda"

    tokens: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}, but at least 1 is needed (usual: 4096)")


@torch.no_grad()
def prune_(
    model: PreTrainedModel, config: MagnitudeConfig, data: Iterable[dict[str, Tensor]] | None = None
) -> PreTrainedModel:
    """Set single weights of every linear layer in the blocks (attention and FFN) to 0, in place.

    The model's class, size and speed stay; its config says how it was pruned. :func:`weight_sparsity` says how many
    weights are 0; hardware that skips them would be left with ``1 - weight_sparsity(model)`` of
    ``cost_per_token(model).gflops``.

    Args:
        model: dense, of a known family.
        config: ``WandaConfig`` or ``MagnitudeConfig``.
        data: batches for the model, needed by Wanda.

    Returns:
        The same model.

    Raises:
        ValueError: unknown family, a model that is sparse already, data missing, a matrix that the pattern does not
            fit, quantised weights, Wanda on an encoder-decoder. The model is then as it was.
    """
    if hasattr(model.config, "lte") or hasattr(model.config, TEAL):
        raise ValueError("the model is sparse already: load the dense checkpoint to prune it")
    check_not_shared(model, "prune_ compares")
    if isinstance(config, WandaConfig):
        check_inputs_are_tokens(model.config)
    check_linears(model, model.config.model_type)
    sites = linear_sites(model, model.config.model_type)
    for site in sites:
        inputs, group = rows_of(site.linear).shape[1], config.kept_of[1]
        if group and inputs % group:
            raise ValueError(f"{site.name} has {inputs} inputs, which pattern {config.pattern} does not divide")
    by_input = isinstance(config, WandaConfig)
    squares: list[Tensor | None] = [None] * len(sites)
    if isinstance(config, WandaConfig):
        squares = list(_input_squares(model, sites, config, data))
    for site, square_I in zip(sites, squares, strict=True):
        rows_OI = rows_of(site.linear)
        scores_OI = rows_OI.float().abs()
        if square_I is not None:
            scores_OI *= square_I.sqrt().to(scores_OI.device)
        rows_OI.mul_(_kept(scores_OI, config, by_row=by_input))
    setattr(model.config, SECTION, {"method": config.name, **asdict(config)})
    return model


def weight_sparsity(model: PreTrainedModel) -> float:
    """The fraction of weights that are 0 in the linear layers of the blocks."""
    weights = [site.linear.weight for site in linear_sites(model, model.config.model_type)]
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)


def _input_squares(
    model: PreTrainedModel,
    sites: list[LinearSite],
    config: WandaConfig,
    data: Iterable[dict[str, Tensor]] | None,
) -> Iterable[Tensor]:
    """Of each layer's inputs the sum of squares over tokens, ``[I]``."""
    if data is None:
        raise ValueError("Wanda needs data: pass prune_(model, config, data=batches)")
    if model.config.is_encoder_decoder:
        raise ValueError("Wanda here is for models with one stack of blocks: use MagnitudeConfig for this one")
    wanted = [(site.name, site.linear, _squares) for site in sites]
    recorded = record_inputs(model, wanted, first_tokens(data, config.tokens), config.tokens)
    return (squares.sum(0) for squares in recorded)


def _squares(x_TI: Tensor) -> Tensor:
    return x_TI.float().square().sum(0, keepdim=True)


def _kept(scores_OI: Tensor, config: MagnitudeConfig, by_row: bool) -> Tensor:
    """True for the weights to keep."""
    kept, group = config.kept_of
    if group:
        return top_k(scores_OI.unflatten(1, (-1, group)), kept).flatten(1)
    rows = scores_OI if by_row else scores_OI.reshape(1, -1)
    dropped = round(config.target_sparsity * rows.shape[1])
    if dropped == 0:
        return torch.ones_like(scores_OI, dtype=torch.bool)
    cut = rows.kthvalue(dropped, dim=1, keepdim=True).values
    tied = rows == cut  # many in bf16: the first of them go, as many as are wanted
    spare = dropped - (rows < cut).sum(1, keepdim=True)
    return ((rows > cut) | tied & (tied.cumsum(1, dtype=torch.int32) > spare)).view_as(scores_OI)
