"""The definition of ``sparse_ffn`` in plain PyTorch: every expert is computed, then inactive experts are masked.

It is differentiable and runs on any device, in any dtype. Every other backend is tested against it. A quantised matrix
becomes floats when it is used, one matrix at a time, and these floats are not kept.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lte.core.linear import linear_fp32
from lte.core.selection import scale_experts, threshold
from lte.ops.weights import Activation, Affine, FFNWeights, LowRank, RouterWeights


def refuses(x_TD: Tensor, weights: FFNWeights) -> str | None:
    """Nothing is refused."""
    return None


def sparse_ffn(x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None = None) -> Tensor:
    """As :func:`lte.ops.sparse_ffn.sparse_ffn`. Weights are cast to the dtype of ``x``."""
    if active_TE is None:
        active_TE = route(x_TD, weights.router)
    hidden_TF = scale_experts(neurons(x_TD, weights), active_TE)
    y_TD = _linear(hidden_TF, weights.down.matrix.floats(x_TD.dtype).T, weights.down.bias)
    if weights.compensation is None:
        return y_TD
    return y_TD + compensation(x_TD, weights.compensation, active_TE)


def compensation(x_TD: Tensor, weights: LowRank, weights_TE: Tensor) -> Tensor:
    """Return the compensation of idle experts, ``[..., D]``.

    ``weights_TE`` is the weight of each expert: a score, or a boolean that says whether it is kept. The share of idle
    experts of a token is 1 - the mean weight of its experts.
    """
    idle_T1 = 1 - weights_TE.float().mean(-1, keepdim=True)
    kept_TR = _linear(x_TD, weights.compress.floats(x_TD.dtype), weights.bias)
    return _linear(kept_TR * idle_T1.to(kept_TR.dtype), weights.expand.floats(x_TD.dtype), None)


def neurons(x_TD: Tensor, weights: FFNWeights) -> Tensor:
    """Return all neurons after the activation, ``[T, F]``."""
    up_TF = _affine(x_TD, weights.up)
    if weights.gate is None:
        return activate(up_TF, weights.act)
    return activate(_affine(x_TD, weights.gate), weights.act) * up_TF


def route(x_TD: Tensor, router: RouterWeights) -> Tensor:
    """Return the router's choice, ``[T, E]`` bool."""
    return threshold(logits(x_TD, router), router.threshold)


def logits(x_TD: Tensor, router: RouterWeights) -> Tensor:
    """Return the values that the router compares with its threshold, ``[..., E]`` in fp32."""
    return linear_fp32(x_TD, router.matrix.floats(torch.float32), router.bias)


def activate(hidden: Tensor, act: Activation) -> Tensor:
    """Return the activation of this name, applied to ``hidden``."""
    if act == "silu":
        return F.silu(hidden)
    if act == "relu":
        return F.relu(hidden)
    if act == "relu2":
        return F.relu(hidden).square()
    return F.gelu(hidden, approximate="tanh" if act == "gelu_tanh" else "none")


def _affine(x: Tensor, weights: Affine) -> Tensor:
    return _linear(x, weights.matrix.floats(x.dtype), weights.bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
