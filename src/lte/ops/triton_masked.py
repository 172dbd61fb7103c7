"""Many tokens: all experts by cuBLAS, then activation, gate and mask in one kernel in place of three."""
# pyright: basic, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from lte.ops.reference import route
from lte.ops.triton_activations import activate
from lte.ops.weights import FFNWeights

_MIXED_MM = hasattr(torch.ops.aten.mm, "dtype")
"""Whether this torch multiplies half precision into fp32 (2.8 and later)."""


@triton.jit
def _activate_and_mask(
    gate, up, active, hidden, F, E, ACT: tl.constexpr, GATED: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    neurons_F = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_F = neurons_F < F
    on_F = tl.load(active + token * E + neurons_F // N, mask=inside_F, other=0) != 0
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
    if active_TE is None:
        active_TE = _route(x_TD, weights)
    up_TF = F.linear(x_TD, weights.up, weights.up_bias)
    gate_TF = up_TF if weights.gate is None else F.linear(x_TD, weights.gate, weights.gate_bias)
    _activate_and_mask[(tokens, triton.cdiv(weights.d_ff, block))](
        gate_TF,
        up_TF,
        active_TE.view(torch.uint8),
        up_TF,
        weights.d_ff,
        weights.num_experts,
        ACT=weights.act,
        GATED=weights.gate is not None,
        N=weights.expert_size,
        BLOCK=block,
    )
    return F.linear(up_TF, weights.down.T, weights.down_bias)


def _route(x_TD: Tensor, weights: FFNWeights) -> Tensor:
    """As :func:`route`. In half precision the product is left to tensor cores, which accumulate and give fp32 too."""
    half = x_TD.dtype == weights.router.dtype and x_TD.dtype.itemsize == 2
    if not half or not x_TD.is_cuda or not _MIXED_MM:
        return route(x_TD, weights)
    logits_TE = torch.mm(x_TD, weights.router.T, out_dtype=torch.float32)
    return (logits_TE if weights.router_bias is None else logits_TE + weights.router_bias) > weights.threshold
