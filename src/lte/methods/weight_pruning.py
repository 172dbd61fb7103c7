"""One-shot pruning of single weights, by Wanda (Sun et al., arXiv 2306.11695) or magnitude. The model stays stock."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lte.core.selection import top_k
from lte.surgery.activations import check_inputs_are_tokens, record_inputs
from lte.surgery.conversion import Batch, Conversion, Progress
from lte.surgery.convert import sparsify_
from lte.surgery.cost import weight_sparsity
from lte.surgery.linears import rows_of
from lte.surgery.sites import LinearSite, check_linears, linear_sites


@dataclass(frozen=True)
class MagnitudeConfig(Conversion):
    """How to prune by magnitude: in each matrix, the weights with the least ``|w|`` become 0.

    The model's class, size and speed do not change, and it loads without ``lte``. Its config says how it was pruned.
    :func:`lte.weight_sparsity` counts the zeros. Hardware that skips them would need ``1 - weight_sparsity(model)`` of
    ``cost_per_token(model).gflops``.

    Attributes:
        target_sparsity: fraction of the weights that become 0, in every linear layer of the blocks.
        pattern: ``N:M`` keeps N of every M consecutive inputs, e.g. 2:4 or 4:8. None has no pattern.

    Raises:
        ValueError: an option is outside its range.
    """

    name: ClassVar[str] = "magnitude"
    section: ClassVar[str] = "pruning"
    doing: ClassVar[str] = "pruning"

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
        """N and M of the pattern; zeros without a pattern."""
        kept, _, group = (self.pattern or "").partition(":")
        return (int(kept), int(group)) if kept.isdecimal() and group.isdecimal() else (0, 0)

    def check(self, model: PreTrainedModel) -> None:
        check_linears(model, model.config.model_type)
        for site in linear_sites(model, model.config.model_type):
            inputs, group = rows_of(site.linear).shape[1], self.kept_of[1]
            if group and inputs % group:
                raise ValueError(f"{site.name} has {inputs} inputs, which pattern {self.pattern} does not divide")

    @torch.no_grad()
    def convert_(self, model: PreTrainedModel, batches: list[Batch], progress: Progress) -> None:
        sites = linear_sites(model, model.config.model_type)
        lengths = self.input_lengths(model, sites, progress(batches))
        for site, length_I in zip(progress(sites), lengths, strict=True):
            rows_OI = rows_of(site.linear)
            scores_OI = rows_OI.float().abs()
            if length_I is not None:
                scores_OI *= length_I.to(scores_OI.device)
            rows_OI.mul_(_kept(scores_OI, self, by_row=length_I is not None))
        setattr(model.config, self.section, self.to_dict())

    def input_lengths(
        self, model: PreTrainedModel, sites: list[LinearSite], batches: Iterable[Batch]
    ) -> list[Tensor] | list[None]:
        """Return the L2 length of each layer's inputs over tokens, ``[I]``, as a factor of weights; None for no factor.

        With lengths, weights are compared within each output. Without lengths, they are compared within each matrix.
        """
        return [None] * len(sites)

    def describe(self, config: Any) -> str:
        return f"dense, pruned by {self.name} to {self.target_sparsity:.0%}"

    def outcome(self, model: PreTrainedModel) -> str:
        return f"{weight_sparsity(model):.1%} of the blocks' weights are 0"


@dataclass(frozen=True)
class WandaConfig(MagnitudeConfig):
    """How to prune by Wanda: of each output's weights, those with the least ``|w| * |x|`` become 0. x is the input.

    Attributes:
        target_sparsity: fraction of the weights that become 0, of every output of every linear layer of the blocks.
        pattern: ``N:M`` keeps N of every M consecutive inputs, e.g. 2:4 or 4:8. None has no pattern.
        tokens: number of tokens of the data.

    Raises:
        ValueError: an option is outside its range.
    """

    name: ClassVar[str] = "wanda"

    tokens: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}, but at least 1 is needed (usual: 4096)")

    def check(self, model: PreTrainedModel) -> None:
        if model.config.is_encoder_decoder:
            raise ValueError("Wanda here is for models with one stack of blocks: use MagnitudeConfig for this one")
        check_inputs_are_tokens(model.config)
        super().check(model)

    @property
    def data_tokens(self) -> int:
        return self.tokens

    def input_lengths(self, model: PreTrainedModel, sites: list[LinearSite], batches: Iterable[Batch]) -> list[Tensor]:
        wanted = [(site.name, site.linear, _squares) for site in sites]
        recorded = record_inputs(model, wanted, batches, self.tokens)
        return [squares.sum(0).sqrt() for squares in recorded]


def prune_(
    model: PreTrainedModel, config: MagnitudeConfig, data: Iterable[dict[str, Tensor]] | None = None
) -> PreTrainedModel:
    """:func:`lte.sparsify_` with a :class:`WandaConfig` or a :class:`MagnitudeConfig`."""
    return sparsify_(model, config, data)


def _squares(x_TI: Tensor) -> Tensor:
    return x_TI.float().square().sum(0, keepdim=True)


def _kept(scores_OI: Tensor, config: MagnitudeConfig, by_row: bool) -> Tensor:
    """Return True for the weights that are kept."""
    kept, group = config.kept_of
    if group:
        return top_k(scores_OI.unflatten(1, (-1, group)), kept).flatten(1)
    rows = scores_OI if by_row else scores_OI.reshape(1, -1)
    dropped = round(config.target_sparsity * rows.shape[1])
    if dropped == 0:
        return torch.ones_like(scores_OI, dtype=torch.bool)
    cut = rows.kthvalue(dropped, dim=1, keepdim=True).values
    tied = rows == cut  # equal values are common in bf16: the first of them are dropped
    spare = dropped - (rows < cut).sum(1, keepdim=True)
    return ((rows > cut) | tied & (tied.cumsum(1, dtype=torch.int32) > spare)).view_as(scores_OI)
