"""Many tokens: all experts by cuBLAS, then activation, gate and mask in one kernel in place of three."""
# pyright: basic, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from lte.ops.triton_activations import activate
from lte.ops.weights import FFNWeights

_MIXED_MM = hasattr(torch.ops.aten.mm, "dtype")
"""Whether this torch multiplies half precision into fp32 (2.8 and later)."""


@triton.jit
def _activate_and_mask(
    gate,
    up,
    logits,
    bias,
    active,
    hidden,
    F,
    E,
    threshold,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    neurons_F = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_F = neurons_F < F
    if GIVEN:
        on_F = tl.load(active + token * E + neurons_F // N, mask=inside_F, other=0) != 0
    else:
        logit_F = tl.load(logits + token * E + neurons_F // N, mask=inside_F, other=0.0)
        if HAS_BIAS:
            logit_F += tl.load(bias + neurons_F // N, mask=inside_F, other=0.0).to(tl.float32)
        on_F = logit_F > threshold
    wanted_F = inside_F & on_F
    u_F = tl.load(up + token * F + neurons_F, mask=wanted_F, other=0.0).to(tl.float32)
    if GATED:
        g_F = tl.load(gate + token * F + neurons_F, mask=wanted_F, other=0.0).to(tl.float32)
        h_F = activate(g_F, ACT).to(hidden.dtype.element_ty).to(tl.float32) * u_F
    else:
        h_F = activate(u_F, ACT)
    tl.store(hidden + token * F + neurons_F, tl.where(on_F, h_F, 0.0), mask=inside_F)


def masked_ffn(x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None) -> Tensor:
    """``[T, D]`` -> ``[T, D]``."""
    tokens, block = x_TD.shape[0], 1024
    given = active_TE is not None
    up_TF = _linear(x_TD, weights.up, weights.up_bias)
    gate_TF = up_TF if weights.gate is None else _linear(x_TD, weights.gate, weights.gate_bias)
    _activate_and_mask[(tokens, triton.cdiv(weights.d_ff, block))](
        gate_TF,
        up_TF,
        None if given else _logits(x_TD, weights.router),
        weights.router_bias,
        active_TE.view(torch.uint8) if given else None,
        up_TF,
        weights.d_ff,
        weights.num_experts,
        weights.threshold,
        ACT=weights.act,
        GATED=weights.gate is not None,
        GIVEN=given,
        HAS_BIAS=weights.router_bias is not None,
        N=weights.expert_size,
        BLOCK=block,
    )
    return _linear(up_TF, weights.down.T, weights.down_bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _logits(x_TD: Tensor, router_ED: Tensor) -> Tensor:
    """fp32 ``[T, E]``, without the bias. In half precision by tensor cores, which accumulate in fp32 too."""
    if x_TD.is_cuda and x_TD.dtype == router_ED.dtype and x_TD.dtype.itemsize == 2 and _MIXED_MM:
        return torch.mm(x_TD, router_ED.T, out_dtype=torch.float32)
    return F.linear(x_TD.float(), router_ED.float())
