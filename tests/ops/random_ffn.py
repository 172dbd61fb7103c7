"""Random FFNs for the tests of backends."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lte.ops.quantise import quantise_ffn
from lte.ops.weights import (
    TENSORS,
    Activation,
    Affine,
    FFNWeights,
    LowRank,
    Matrix,
    RouterWeights,
    unflatten,
)


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

    inner, outer, num_experts = d_model**-0.5, d_ff**-0.5, d_ff // expert_size
    up_bias, down_bias = (draw(d_ff, scale=0.5), draw(d_model, scale=0.5)) if bias else (None, None)
    gate_bias = draw(d_ff, scale=0.5) if bias and gated else None
    weights = FFNWeights(
        up=Affine(Matrix(draw(d_ff, d_model, scale=inner)), up_bias),
        down=Affine(Matrix(draw(d_ff, d_model, scale=outer)), down_bias),
        router=RouterWeights(Matrix(draw(num_experts, d_model, scale=inner))),
        gate=Affine(Matrix(draw(d_ff, d_model, scale=inner)), gate_bias) if gated else None,
        act=act,
    )
    weights = changed(weights, {"router.bias": draw(num_experts, scale=0.1)})
    if not rank:
        return weights
    compress, bias_R = Matrix(draw(rank, d_model, scale=inner)), draw(rank, scale=0.5)
    return replace(weights, compensation=LowRank(compress, bias_R, Matrix(draw(d_model, rank, scale=rank**-0.5))))


quantised = quantise_ffn


def tensors_of(weights: FFNWeights) -> dict[str, Tensor]:
    """The tensors that are there, by name."""
    return dict(weights.named_tensors())


def changed(weights: FFNWeights, tensors: Mapping[str, Tensor | None], threshold: float | None = None) -> FFNWeights:
    """The same FFN with other tensors of these names; and another threshold, unless it is None."""
    assert tensors.keys() <= set(TENSORS)
    threshold = weights.router.threshold if threshold is None else threshold
    given = {**dict(zip(TENSORS, weights.tensors, strict=True)), **tensors}
    return unflatten(list(given.values()), threshold, weights.act)


def make_x(tokens: int, weights: FFNWeights, seed: int = 1) -> Tensor:
    """Inputs for it, in its dtype and on its device."""
    x = torch.randn(tokens, weights.d_model, generator=torch.Generator().manual_seed(seed))
    return x.to(weights.up.matrix.rows.device, weights.up.matrix.dtype)


def make_active(tokens: int, weights: FFNWeights, share: str, seed: int = 2) -> Tensor:
    """Which experts are active: ``none``, ``one`` a token, ``half`` or ``all``."""
    shape = (tokens, weights.num_experts)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(shape, generator=generator)
    count = {"none": 0, "one": 1, "half": weights.num_experts // 2, "all": weights.num_experts}[share]
    kept = scores.argsort(-1)[:, :count]
    return torch.zeros(shape, dtype=torch.bool).scatter(-1, kept, True).to(weights.up.matrix.rows.device)


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """Relative RMS error; exact zeros must be met exactly, NaN never passes."""
    found, expected = found.double().cpu(), expected.double().cpu()
    norm = expected.norm()
    return float((found - expected).norm() / norm) if norm > 0 else float("inf") if found.norm() != 0 else 0.0
