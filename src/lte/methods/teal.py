"""TEAL: small inputs of every linear layer count as 0 (Liu et al., arXiv 2408.14690). No routers, no training."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lte.core.accounting import Cost, G
from lte.methods.choosing import count_tokens
from lte.methods.cuts import check_inputs, set_cuts_, sizes_of_inputs
from lte.methods.teal_allocation import MOST_GREEDY, greedy_sparsities
from lte.modules.input_threshold import add_cut_
from lte.modules.recording import track_inputs
from lte.modules.sparsity_meter import SparsityMeter
from lte.surgery.activations import record_inputs
from lte.surgery.architectures import become_lte_
from lte.surgery.conversion import Batch, Conversion, Progress
from lte.surgery.convert import sparsify_
from lte.surgery.cost import Spent, cost_per_token
from lte.surgery.sites import find_sites, linear_sites

Allocation = Literal["uniform", "greedy"]


@dataclass(frozen=True)
class TEALConfig(Conversion):
    """How to convert a model for TEAL (Liu et al., arXiv 2408.14690): a threshold for each linear layer, no training.

    In every linear layer of the blocks, attention and FFN, inputs that are not larger than the layer's threshold count
    as 0. The weights that belong to them need not be read.

    Thresholds are quantiles of the inputs' sizes. They are set one layer after the other in one pass over the data,
    behind layers that are sparse already. A token does not depend on other tokens of its batch. Padding does not count
    in the quantiles. The model must be one stack of blocks, not an encoder-decoder.

    Attributes:
        target_sparsity: fraction of the inputs that count as 0, in (0, 1): in every layer, or with greedy in the mean
            over each block's weights.
        tokens: number of tokens of the data for the thresholds.
        allocation: ``uniform``, or ``greedy``: in each block, layers that matter less to its output are sparser than
            others. This takes about a hundred passes through each block.

    Raises:
        ValueError: an option is outside its range.
    """

    name: ClassVar[str] = "teal"
    section: ClassVar[str] = "teal"
    stock: ClassVar[bool] = False
    doing: ClassVar[str] = "setting thresholds"
    added_later: ClassVar[tuple[str, ...]] = ("allocation",)

    target_sparsity: float = 0.5
    tokens: int = 4096
    allocation: Allocation = "uniform"

    def __post_init__(self) -> None:
        if not 0 < self.target_sparsity < 1:
            raise ValueError(
                f"target_sparsity is {self.target_sparsity}, but it is the fraction of inputs taken for 0: "
                "between 0 and 1, e.g. 0.5"
            )
        if self.allocation == "greedy" and self.target_sparsity > MOST_GREEDY:
            raise ValueError(
                f"target_sparsity is {self.target_sparsity}, but greedy leaves at least {1 - MOST_GREEDY:.0%} of a "
                "layer: give allocation='uniform'"
            )
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}, but at least 1 is needed (usual: 4096)")
        if self.allocation not in get_args(Allocation):
            raise ValueError(f"allocation is {self.allocation!r}, but it is one of {', '.join(get_args(Allocation))}")

    def check(self, model: PreTrainedModel) -> None:
        check_inputs(model, "TEAL here")

    @property
    def data_tokens(self) -> int:
        return self.tokens

    @torch.no_grad()
    def convert_(self, model: PreTrainedModel, batches: list[Batch], progress: Progress) -> None:
        tokens = min(self.tokens, count_tokens(batches))
        self.install_(model)
        become_lte_(model, self)
        layers = _linears(model)
        wanted = sizes_of_inputs(layers, tokens)
        sparsity = dict.fromkeys(layers, self.target_sparsity)
        if self.allocation == "greedy":
            model.eval()
            sizes = dict(zip(layers, record_inputs(model, wanted, batches, tokens), strict=True))
            sparsity = greedy_sparsities(model, layers, sizes, batches[0], self.target_sparsity, progress)
        set_cuts_(model, wanted, [sparsity[name] for name in layers], progress(batches), tokens)
        model.eval()

    def install_(self, model: PreTrainedModel) -> None:
        """Give every linear layer of the blocks a threshold of 0, before weights are loaded or data is read."""
        for linear in _linears(model).values():
            add_cut_(linear)

    def cost(self, model: PreTrainedModel, sparsity: float | Mapping[str, float] = 0.0) -> Cost:
        return teal_cost(model, sparsity)

    @contextmanager
    def meter(self, model: PreTrainedModel, entry: nn.Module) -> Iterator[SparsityMeter]:
        with track_inputs(entry, _linears(model)) as meter:
            yield meter

    def spent(self, model: PreTrainedModel, meter: SparsityMeter) -> Spent:
        by_linear, dense = meter.by_linear, cost_per_token(model)
        cost = teal_cost(model, by_linear)
        layers = []
        for site in find_sites(model, model.config.model_type):
            weights = {name: linear.get_parameter("weight").numel() for name, linear in site.projections().items()}
            layers.append(sum(by_linear[name] * count for name, count in weights.items()) / site.num_weights)
        return Spent(
            sparsity=1 - cost.ffn_gflops / dense.ffn_gflops,
            layer_sparsity=layers,
            attention_sparsity=1 - cost.attention_gflops / dense.attention_gflops,
            gflops_per_token=cost.gflops,
            gflops_per_token_dense=dense.gflops,
            mode="hard",
        )

    def describe(self, config: Any) -> str:
        return f"TEAL's thresholds, {self.target_sparsity:.0%} of the inputs of every linear layer"

    def outcome(self, model: PreTrainedModel) -> str:
        return f"thresholds on the inputs of {len(_linears(model))} linear layers"

    def to_dict(self) -> dict[str, Any]:
        """Return the options. The name of the section is that of the conversion, so it is not written again."""
        return {name: value for name, value in super().to_dict().items() if name != "method"}


def teal_(model: PreTrainedModel, config: TEALConfig, data: Iterable[dict[str, Tensor]]) -> PreTrainedModel:
    """:func:`lte.sparsify_` with a :class:`TEALConfig`."""
    return sparsify_(model, config, data)


def teal_cost(
    model: PreTrainedModel, sparsity: float | Mapping[str, float], bytes_per_weight: float | None = None
) -> Cost:
    """Return FLOPs and weight bytes of one token if linear layers skip the weights of inputs that are 0.

    The count is that of :func:`~lte.surgery.cost.cost_per_token`, and both results can be compared. ``gflops`` is FFN
    and attention projections together, and ``weight_bytes`` are the bytes that they read. Comparisons with a threshold
    are not counted, and neither are activations.

    Args:
        model: dense or converted for TEAL.
        sparsity: fraction of inputs that are 0: one number, or one for each linear layer of the blocks, by name.
        bytes_per_weight: None takes the model's dtype.

    Raises:
        ValueError: the family is unknown, or a sparsity is outside [0, 1] or missing.
    """
    dense = cost_per_token(model, 0.0, bytes_per_weight=bytes_per_weight)
    size = model.dtype.itemsize if bytes_per_weight is None else bytes_per_weight
    sites = linear_sites(model, model.config.model_type)
    names = [site.name for site in sites]
    by_name = dict.fromkeys(names, sparsity) if isinstance(sparsity, int | float) else sparsity
    if missing := {*names} - by_name.keys():
        raise ValueError(f"no sparsity given for {len(missing)} linear layers, first {min(missing)}")
    if not all(0 <= by_name[name] <= 1 for name in names):
        raise ValueError(f"sparsity is {sparsity}, but it is a fraction between 0 (dense) and 1")
    saved = {site.name: by_name[site.name] * site.linear.weight.numel() for site in sites}
    total, ffn = sum(saved.values()), sum(saved[site.name] for site in sites if site.in_ffn)
    return replace(
        dense,
        gflops=dense.gflops - 2 * total / G,
        ffn_gflops=dense.ffn_gflops - 2 * ffn / G,
        attention_gflops=dense.attention_gflops - 2 * (total - ffn) / G,
        weight_bytes=round(dense.weight_bytes - total * size),
    )


def _linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    return {site.name: site.linear for site in linear_sites(model, model.config.model_type)}
