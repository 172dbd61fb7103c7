"""Many tokens: cuBLAS computes all experts, and two kernels compute router, activation, gate and mask.

PyTorch computes the compensation, because the large products take nearly all of the time.
"""
# pyright: basic, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from lte.ops import reference, triton_router
from lte.ops.triton_activations import activate
from lte.ops.triton_device import device_info
from lte.ops.triton_router import Choice, chosen
from lte.ops.weights import FFNWeights


@triton.jit
def _activate_and_mask(
    gate,
    up,
    hidden,
    logits,
    router_bias,
    T,
    E,
    stride_s,
    stride_t,
    stride_e,
    threshold,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_ROUTER_BIAS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
    tokens_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts_E = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    on_TE = chosen(
        logits,
        router_bias,
        stride_s,
        stride_t,
        stride_e,
        threshold,
        tokens_T,
        experts_E,
        T,
        E,
        SPLITS,
        BLOCK_S,
        HAS_ROUTER_BIAS,
    )
    # one mask for all neurons of an expert, so that loads stay wide
    on_TEN = on_TE[:, :, None]
    at_TEN = (tokens_T[:, None] * E + experts_E[None, :])[:, :, None] * N + tl.arange(0, N)[None, None, :]
    u_TEN = tl.load(up + at_TEN, mask=on_TEN, other=0.0).to(tl.float32)
    if GATED:
        g_TEN = tl.load(gate + at_TEN, mask=on_TEN, other=0.0).to(tl.float32)
        h_TEN = activate(g_TEN, ACT).to(hidden.dtype.element_ty).to(tl.float32) * u_TEN
    else:
        h_TEN = activate(u_TEN, ACT)
    inside_TE = (tokens_T < T)[:, None] & (experts_E < E)[None, :]
    tl.store(hidden + at_TEN, tl.where(on_TEN, h_TEN, 0.0), mask=inside_TE[:, :, None])


@dataclass(frozen=True)
class Tuning:
    """How the work is divided.

    Attributes:
        tokens, neurons: the part of a program of ``_activate_and_mask``.
        warps: of such a program.
        router_tokens: up to this number our own kernel computes the router, because cuBLAS makes too few programs.
        router: how the work of that kernel is divided; None takes what fits.
    """

    tokens: int = 1
    neurons: int = 1024
    warps: int = 4
    router_tokens: int = 1024
    router: triton_router.Tuning | None = None


def masked_ffn(x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None, tuning: Tuning | None = None) -> Tensor:
    """``[T, D]`` -> ``[T, D]``."""
    tuning = tuning or Tuning()
    T, E, N = x_TD.shape[0], weights.num_experts, weights.expert_size
    up_TF = _linear(x_TD, weights.up.matrix.floats(x_TD.dtype), weights.up.bias)
    gate_TF = (
        up_TF if weights.gate is None else _linear(x_TD, weights.gate.matrix.floats(x_TD.dtype), weights.gate.bias)
    )
    block = max(1, tuning.neurons // N)
    choice = _choose(x_TD, weights, active_TE, tuning)
    _activate_and_mask[(triton.cdiv(T, tuning.tokens), triton.cdiv(E, block))](
        gate_TF,
        up_TF,
        up_TF,
        T=T,
        E=E,
        **choice.arguments(),
        ACT=weights.act,
        GATED=weights.gate is not None,
        N=N,
        BLOCK_T=tuning.tokens,
        BLOCK_E=block,
        num_warps=tuning.warps,
        **device_info(x_TD.device).overlap,
    )
    y_TD = _linear(up_TF, weights.down.matrix.floats(x_TD.dtype).T, weights.down.bias)
    if weights.compensation is not None:
        y_TD += reference.compensation(x_TD, weights.compensation, choice.active())
    return y_TD


def _choose(x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None, tuning: Tuning) -> Choice:
    if active_TE is not None:
        return triton_router.given(active_TE, x_TD)
    if tuning.router_tokens < len(x_TD):
        return triton_router.at_once(x_TD, weights.router)
    return triton_router.in_parts(x_TD, weights.router, tuning.router, by_expert=False)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
