"""Many tokens: all experts by cuBLAS, then router, activation, gate and mask in two kernels of ours."""
# pyright: basic, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from lte.ops import triton_router
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
    E,
    stride_s,
    stride_t,
    stride_e,
    threshold,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_ROUTER_BIAS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    experts_E = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside_E = experts_E < E
    on_E = chosen(
        logits,
        router_bias,
        stride_s,
        stride_t,
        stride_e,
        threshold,
        token,
        experts_E,
        inside_E,
        E,
        SPLITS,
        HAS_ROUTER_BIAS,
    )
    # an expert a row: one mask for all of its neurons keeps their loads wide
    at_EN = (token * E + experts_E)[:, None] * N + tl.arange(0, N)[None, :]
    u_EN = tl.load(up + at_EN, mask=on_E[:, None], other=0.0).to(tl.float32)
    if GATED:
        g_EN = tl.load(gate + at_EN, mask=on_E[:, None], other=0.0).to(tl.float32)
        h_EN = activate(g_EN, ACT).to(hidden.dtype.element_ty).to(tl.float32) * u_EN
    else:
        h_EN = activate(u_EN, ACT)
    tl.store(hidden + at_EN, tl.where(on_E[:, None], h_EN, 0.0), mask=inside_E[:, None])


@dataclass(frozen=True)
class Tuning:
    """How the work is cut.

    Attributes:
        neurons: of a token, that a program of ``_activate_and_mask`` takes.
        warps: of it.
        router_tokens: up to so many the router is a kernel of ours. cuBLAS cuts it into too few programs.
        router: how that kernel is cut; None: as fits.
    """

    neurons: int = 1024
    warps: int = 4
    router_tokens: int = 1024
    router: triton_router.Tuning | None = None


def masked_ffn(x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None, tuning: Tuning | None = None) -> Tensor:
    """``[T, D]`` -> ``[T, D]``."""
    tuning = tuning or Tuning()
    T, E, N = x_TD.shape[0], weights.num_experts, weights.expert_size
    up_TF = _linear(x_TD, weights.up, weights.up_bias)
    gate_TF = up_TF if weights.gate is None else _linear(x_TD, weights.gate, weights.gate_bias)
    block = max(1, tuning.neurons // N)
    _activate_and_mask[(T, triton.cdiv(E, block))](
        gate_TF,
        up_TF,
        up_TF,
        E=E,
        **_choose(x_TD, weights, active_TE, tuning).arguments(),
        ACT=weights.act,
        GATED=weights.gate is not None,
        N=N,
        BLOCK_E=block,
        num_warps=tuning.warps,
        **device_info(x_TD.device).overlap,
    )
    return _linear(up_TF, weights.down.T, weights.down_bias)


def _choose(x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None, tuning: Tuning) -> Choice:
    if active_TE is not None:
        return triton_router.given(active_TE)
    T, D = x_TD.shape
    if tuning.router_tokens < T:
        return triton_router.at_once(x_TD, weights)
    cut = tuning.router or triton_router.Tuning.of(x_TD.device, T, D, weights.router.dtype.itemsize)
    return triton_router.in_parts(x_TD, weights, cut, by_expert=False)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
