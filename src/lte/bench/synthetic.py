"""Random FFNs with routers that behave like trained ones: layers, experts and tokens differ in their sparsity.

The routers run as usual. Only their biases are set, by quantiles of their own logits.
"""

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from lte.bench.shapes import FFNSize
from lte.ops.weights import Affine, FFNWeights, LowRank, Matrix, RouterWeights

LAYER_SPREAD = 0.35
"""Standard deviation over layers of logit(sparsity): 0.31, 0.33, 0.40 in the runs of results/wikitext2_before.jsonl."""

EXPERT_SPREAD = 1.0
"""Standard deviation over the experts of a layer of logit(share of tokens that want the expert). Assumed."""

TOKEN_SPREAD = 0.05
"""Correlation of the logits of a layer's experts: some tokens want more experts than others. Assumed."""

OPEN = 1e3
"""A bias beyond any logit: all tokens want that expert. With the other sign, no token wants it."""


def layer_targets(layers: int, sparsity: float, seed: int = 0) -> list[float]:
    """Return a sparsity for each layer, with mean ``sparsity`` and the spread of trained layers."""
    normal = statistics.NormalDist()
    quantiles = torch.tensor([normal.inv_cdf((i + 0.5) / layers) for i in range(layers)])
    order = torch.randperm(layers, generator=torch.Generator().manual_seed(seed))
    return _spread(LAYER_SPREAD * quantiles[order], sparsity).tolist()


def random_ffn(
    size: FFNSize,
    expert_size: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    rank: int = 0,
) -> FFNWeights:
    """Return random weights of an FFN, made on ``device``. Router biases are 0.

    Args:
        rank: rank of the compensation; 0 for none.
    """
    F, D = size.d_ff, size.d_model

    def draw(rows: int, columns: int, scale: float) -> Matrix:
        empty = torch.empty(rows, columns, dtype=dtype, device=device)
        return Matrix(empty.normal_(0, scale, generator=generator))

    def zeros(count: int) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=device)

    router = torch.empty(F // expert_size, D, dtype=dtype, device=device)
    random_router_(router, generator)
    return FFNWeights(
        up=Affine(draw(F, D, D**-0.5)),
        gate=Affine(draw(F, D, D**-0.5)) if size.gated else None,
        down=Affine(draw(F, D, F**-0.5)),
        compensation=LowRank(draw(rank, D, D**-0.5), zeros(rank), draw(D, rank, rank**-0.5)) if rank else None,
        router=RouterWeights(Matrix(router), zeros(len(router))),
        act=size.act,
    )


@torch.no_grad()
def random_router_(weight_ED: Tensor, generator: torch.Generator) -> None:
    """Draw a router's weight, in place: independent rows, and a part that all rows have in common."""
    d_model = weight_ED.shape[1]
    device = weight_ED.device
    own = torch.empty(weight_ED.shape, device=device).normal_(0, d_model**-0.5, generator=generator)
    common = torch.empty(d_model, device=device).normal_(0, d_model**-0.5, generator=generator)
    weight_ED.copy_(math.sqrt(1 - TOKEN_SPREAD) * own + math.sqrt(TOKEN_SPREAD) * common)


def biases(logits_TE: Tensor, sparsity: float, threshold: float, seed: int = 0) -> Tensor:
    """Return biases ``[E]`` that give these logits (without bias) that sparsity. Experts differ in their share."""
    num_tokens, num_experts = logits_TE.shape
    if sparsity in (0, 1):
        return torch.full((num_experts,), OPEN if sparsity == 0 else -OPEN, device=logits_TE.device)
    generator = torch.Generator().manual_seed(seed)
    share_E = _spread(EXPERT_SPREAD * torch.randn(num_experts, generator=generator), 1 - sparsity)
    idle_E = (num_tokens * (1 - share_E)).round().long().clamp(0, num_tokens).to(logits_TE.device)
    edge = torch.full((1, num_experts), torch.inf, device=logits_TE.device)
    ordered = logits_TE.sort(dim=0).values
    below = torch.cat([-edge, ordered]).gather(0, idle_E[None])[0]
    above = torch.cat([ordered, edge]).gather(0, idle_E[None])[0]
    cut_E = torch.where(below.isinf(), above - 1, torch.where(above.isinf(), below + 1, (below + above) / 2))
    return threshold - cut_E


def shift_to(logits: Sequence[Tensor], sparsity: float, threshold: float) -> float:
    """Return the number to add to all biases so that these logits (with biases) have that sparsity in all."""
    if sparsity in (0, 1):
        return 0.0
    values = torch.cat([one.flatten() for one in logits]).sort().values
    idle = min(max(round(sparsity * len(values)), 1), len(values) - 1)
    return threshold - float(values[idle - 1 : idle + 1].mean())


def _spread(offsets: Tensor, mean: float) -> Tensor:
    """Return ``sigmoid(offsets + shift)``, with the shift at which its mean is ``mean``."""
    if mean in (0, 1):
        return torch.full_like(offsets, mean)
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (offsets + middle).sigmoid().mean() < mean else (low, middle)
    return (offsets + low).sigmoid()
