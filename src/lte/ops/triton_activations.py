"""Activations inside Triton kernels, by the names of :data:`lte.ops.weights.Activation`."""

import triton
import triton.language as tl


@triton.jit
def activate(x, ACT: tl.constexpr):
    """Return the activation of ``x``. Both are fp32."""
    if ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # tanh(z) = 2 sigmoid(2z) - 1
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "relu":
        y = tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACT == "relu2")
        y = tl.maximum(x, 0.0)
        y = y * y
    return y
