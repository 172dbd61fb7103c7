"""Random FFNs for the tests of backends."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lte.ops.weights import Activation, FFNWeights


def make_weights(
    d_model: int = 64,
    d_ff: int = 128,
    expert_size: int = 32,
    *,
    gated: bool = True,
    bias: bool = False,
    rank: int = 0,
    act: Activation = "silu",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> FFNWeights:
    """A random FFN whose router opens about half of its experts for ``torch.randn`` inputs.

    With a rank its compensation is about as large as its output.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)

    inner, outer = d_model**-0.5, d_ff**-0.5
    biases: dict[str, Any] = {}
    if bias:
        biases = {"up_bias": draw(d_ff, scale=0.5), "down_bias": draw(d_model, scale=0.5)}
        biases |= {"gate_bias": draw(d_ff, scale=0.5)} if gated else {}
    weights = FFNWeights(
        up=draw(d_ff, d_model, scale=inner),
        down=draw(d_ff, d_model, scale=outer),
        router=draw(d_ff // expert_size, d_model, scale=inner),
        gate=draw(d_ff, d_model, scale=inner) if gated else None,
        router_bias=draw(d_ff // expert_size, scale=0.1),
        act=act,
        **biases,
    )
    if not rank:
        return weights
    return replace(
        weights,
        compress=draw(rank, d_model, scale=inner),
        compress_bias=draw(rank, scale=0.5),
        expand=draw(d_model, rank, scale=rank**-0.5),
    )


def make_x(tokens: int, weights: FFNWeights, seed: int = 1) -> Tensor:
    """Inputs for it, in its dtype and on its device."""
    x = torch.randn(tokens, weights.d_model, generator=torch.Generator().manual_seed(seed))
    return x.to(weights.up.dtype).to(weights.up.device)


def make_active(tokens: int, weights: FFNWeights, share: str, seed: int = 2) -> Tensor:
    """Which experts are active: ``none``, ``one`` a token, ``half`` or ``all``."""
    shape = (tokens, weights.num_experts)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(shape, generator=generator)
    count = {"none": 0, "one": 1, "half": weights.num_experts // 2, "all": weights.num_experts}[share]
    kept = scores.argsort(-1)[:, :count]
    return torch.zeros(shape, dtype=torch.bool).scatter(-1, kept, True).to(weights.up.device)


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """Relative RMS error; exact zeros must be met exactly, NaN never passes."""
    found, expected = found.double().cpu(), expected.double().cpu()
    norm = expected.norm()
    return float((found - expected).norm() / norm) if norm > 0 else float("inf") if found.norm() != 0 else 0.0
