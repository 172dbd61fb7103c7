"""The definition of ``sparse_ffn`` in plain PyTorch: every expert is computed, then the inactive are masked.

Differentiable, on any device, in any dtype. Every other backend is tested against it.
"""

from torch import Tensor
from torch.nn import functional as F

from lte.core.selection import scale_experts
from lte.ops.weights import Activation, FFNWeights


def refuses(x_TD: Tensor, weights: FFNWeights) -> str | None:
    """Nothing is refused."""
    return None


def sparse_ffn(x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None = None) -> Tensor:
    """As :func:`lte.ops.sparse_ffn.sparse_ffn`. Weights of another dtype than ``x``'s are cast to it."""
    if active_TE is None:
        active_TE = route(x_TD, weights)
    hidden_TF = scale_experts(neurons(x_TD, weights), active_TE)
    y_TD = _linear(hidden_TF, weights.down.T, weights.down_bias)
    return y_TD if weights.compress is None else y_TD + compensation(x_TD, weights, active_TE)


def compensation(x_TD: Tensor, weights: FFNWeights, active_TE: Tensor) -> Tensor:
    """What stands in for the experts that are not active, ``[T, D]``, of weights that have it."""
    assert weights.compress is not None
    assert weights.expand is not None
    idle_T1 = 1 - active_TE.float().mean(-1, keepdim=True)
    kept_TR = _linear(x_TD, weights.compress, weights.compress_bias)
    return _linear(kept_TR * idle_T1.to(kept_TR.dtype), weights.expand, None)


def neurons(x_TD: Tensor, weights: FFNWeights) -> Tensor:
    """All neurons after the activation, ``[T, F]``."""
    up_TF = _linear(x_TD, weights.up, weights.up_bias)
    if weights.gate is None:
        return activate(up_TF, weights.act)
    return activate(_linear(x_TD, weights.gate, weights.gate_bias), weights.act) * up_TF


def route(x_TD: Tensor, weights: FFNWeights) -> Tensor:
    """The router's choice, ``[T, E]`` bool. Logits are fp32 whatever the dtypes."""
    bias = None if weights.router_bias is None else weights.router_bias.float()
    return F.linear(x_TD.float(), weights.router.float(), bias) > weights.threshold


def activate(hidden: Tensor, act: Activation) -> Tensor:
    """The activation, by name."""
    if act == "silu":
        return F.silu(hidden)
    if act == "relu":
        return F.relu(hidden)
    if act == "relu2":
        return F.relu(hidden).square()
    return F.gelu(hidden, approximate="tanh" if act == "gelu_tanh" else "none")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
