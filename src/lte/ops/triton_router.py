"""The router for several tokens, and the function by which other kernels use its result.

Few tokens and few experts make few tiles, so the programs also divide the width of the router. ``_logits`` writes
partial sums. A kernel that needs the choice sums those of its own experts (:func:`chosen`), without a launch in
between. A choice that is given is passed in the same form, as logits of 0 and 1. The rows of ``compress`` come after
those of the router, in the same launch.
"""
# pyright: basic, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.core.linear import linear_fp32
from lte.ops.triton_device import device_info
from lte.ops.weights import RouterWeights

_MIXED_MM = hasattr(torch.ops.aten.mm, "dtype")
"""Whether this torch multiplies half precision into fp32 (2.8 and later)."""


@triton.jit
def _logits(
    x,
    router,
    scales,
    compress,
    logits,
    T,
    E,
    R,
    D,
    stride_s,
    stride_t,
    stride_e,
    COMPENSATED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
    PDL: tl.constexpr,
):
    split = tl.program_id(1)
    tokens_T = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(0) * BLOCK_E
    if COMPENSATED:  # programs after those of the experts take the rows of ``compress``, which have the router's dtype
        beyond = first - tl.cdiv(E, BLOCK_E) * BLOCK_E
        if beyond >= 0:
            router = compress
            logits += E * stride_e
        first = tl.where(beyond >= 0, beyond, first)
        E = tl.where(beyond >= 0, R, E)
    experts_E = first + tl.arange(0, BLOCK_E)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sum_TE = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    for step in tl.range(0, STEPS):
        cols_D = (split * STEPS + step) * BLOCK_D + tl.arange(0, BLOCK_D)
        x_TD = tl.load(
            x + tokens_T[:, None] * D + cols_D[None, :],
            mask=(tokens_T < T)[:, None] & (cols_D < D)[None, :],
            other=0.0,
        )
        w_ED = tl.load(
            router + experts_E[:, None] * D + cols_D[None, :],
            mask=(experts_E < E)[:, None] & (cols_D < D)[None, :],
            other=0.0,
        )
        if router.dtype.element_ty == tl.int8:
            w_ED = w_ED.to(x.dtype.element_ty)  # exact
        elif x.dtype.element_ty != router.dtype.element_ty:  # a router in fp32 must not be rounded
            x_TD, w_ED = x_TD.to(tl.float32), w_ED.to(tl.float32)
        sum_TE = tl.dot(x_TD, w_ED.T, sum_TE, input_precision="ieee")
    if scales is not None:
        sum_TE *= tl.load(scales + experts_E, mask=experts_E < E, other=0.0).to(tl.float32)[None, :]
    at_TE = split * stride_s + tokens_T[:, None] * stride_t + experts_E[None, :] * stride_e
    tl.store(logits + at_TE, sum_TE, mask=(tokens_T < T)[:, None] & (experts_E < E)[None, :])


@triton.jit
def chosen(
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
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_ROUTER_BIAS: tl.constexpr,
):
    """Return whether these tokens want these experts, ``[T, E]``. Indices beyond the last are allowed."""
    splits_S = tl.arange(0, BLOCK_S)
    inside_TE = (tokens_T < T)[:, None] & (experts_E < E)[None, :]
    at_TE = tokens_T[:, None] * stride_t + experts_E[None, :] * stride_e
    part_STE = tl.load(
        logits + splits_S[:, None, None] * stride_s + at_TE[None, :, :],
        mask=(splits_S < SPLITS)[:, None, None] & inside_TE[None, :, :],
        other=0,
    )
    logits_TE = tl.sum(part_STE.to(tl.float32), axis=0)
    if HAS_ROUTER_BIAS:
        logits_TE += tl.load(router_bias + experts_E, mask=experts_E < E, other=0.0).to(tl.float32)[None, :]
    return (logits_TE > threshold) & inside_TE


@triton.jit
def list_wanted(wanted, order, E, BLOCK_E: tl.constexpr):
    """Return how many experts are wanted, and write their indices to ``order``, which only this program may use."""
    experts_E = tl.arange(0, BLOCK_E)
    on_E = tl.load(wanted + experts_E, mask=experts_E < E, other=0).to(tl.int32)
    tl.store(order + tl.cumsum(on_E, 0) - 1, experts_E, mask=on_E != 0)
    tl.debug_barrier()
    return tl.sum(on_E, 0)


@dataclass(frozen=True)
class Choice:
    """The router's result, for a kernel that calls :func:`chosen`.

    Attributes:
        logits: ``[S, T, E]`` with any strides. The logits are their sum over S.
        bias: ``[E]``, or None.
        threshold: a token wants an expert if its logit with bias is above the threshold.
        z: ``compress x`` of the compensation in parts, ``[S, T, R]``, or None.
    """

    logits: Tensor
    bias: Tensor | None
    threshold: float
    z: Tensor | None = None

    def active(self) -> Tensor:
        """The choice ``[T, E]`` by PyTorch. It may differ from a kernel's if rounding decides about a logit."""
        logits_TE = self.logits.sum(0, dtype=torch.float32)
        if self.bias is not None:
            logits_TE += self.bias
        return logits_TE > self.threshold

    def arguments(self) -> dict[str, Any]:
        """The arguments of kernels, by name."""
        stride_s, stride_t, stride_e = self.logits.stride()
        return {
            "logits": self.logits,
            "router_bias": self.bias,
            "stride_s": stride_s,
            "stride_t": stride_t,
            "stride_e": stride_e,
            "threshold": self.threshold,
            "SPLITS": self.logits.shape[0],
            "BLOCK_S": triton.next_power_of_2(self.logits.shape[0]),
            "HAS_ROUTER_BIAS": self.bias is not None,
        }

    def arguments_of_z(self) -> dict[str, Any]:
        """The arguments of kernels for ``z``, by name."""
        stride_s, stride_t, stride_r = (0, 0, 0) if self.z is None else self.z.stride()
        return {
            "z": self.z,
            "z_stride_s": stride_s,
            "z_stride_t": stride_t,
            "z_stride_r": stride_r,
            "Z_SPLITS": 0 if self.z is None else len(self.z),
        }


@dataclass(frozen=True)
class Tuning:
    """How the work of ``_logits`` is divided.

    Attributes:
        tokens, experts: the part of a program.
        width: columns at a time.
        splits: programs that share the columns.
        stages: number of tiles that are loaded at the same time.
        warps: of a program.
    """

    tokens: int
    experts: int
    width: int
    splits: int
    stages: int
    warps: int

    @staticmethod
    @cache
    def of(device: torch.device, tokens: int, d_model: int, itemsize: int) -> "Tuning":
        """Return the tuning for a shape and a device."""
        padded = max(16, triton.next_power_of_2(tokens))
        rows, experts, width, warps = (padded, 16, 128, 4) if padded > 32 else (padded, 16, 256, 4)
        if padded > 64:
            rows, experts, width, warps = (64, 64, 64, 4) if padded <= 256 else (128, 128, 64, 8)
        width = min(width, triton.next_power_of_2(d_model))
        budget = int(0.45 * device_info(device).shared_memory)
        stages = max(1, min(4, budget // ((rows + experts) * width * itemsize)))
        return Tuning(rows, experts, width, min(8, triton.cdiv(d_model, width)), stages, warps)


def given(active_TE: Tensor, x_TD: Tensor, compress_RD: Tensor | None = None) -> Choice:
    """Return a given choice as a result of the router. With ``compress_RD`` it has ``z``."""
    return Choice(active_TE.view(torch.uint8)[None], None, 0.5, _compressed(x_TD, compress_RD))


def in_parts(
    x_TD: Tensor, router: RouterWeights, tuning: Tuning | None, by_expert: bool, compress_RD: Tensor | None = None
) -> Choice:
    """Return the router's result by ``_logits``. Without a tuning, one that fits is taken.

    Args:
        by_expert: the logits of an expert are contiguous, not those of a token.
        compress_RD: adds ``z``, in the same launch if its dtype is the router's.
    """
    z_STR, router_ED = None, router.matrix.rows
    if compress_RD is not None and compress_RD.dtype != router_ED.dtype:
        z_STR, compress_RD = _compressed(x_TD, compress_RD), None
    (T, D), E, R = x_TD.shape, len(router_ED), 0 if compress_RD is None else len(compress_RD)
    tuning = tuning or Tuning.of(x_TD.device, T, D, max(x_TD.dtype.itemsize, router_ED.dtype.itemsize))
    shape = (tuning.splits, E + R, T) if by_expert else (tuning.splits, T, E + R)
    sums = torch.empty(shape, dtype=torch.float32, device=x_TD.device)
    sums_STE = sums.transpose(1, 2) if by_expert else sums
    blocks = triton.cdiv(E, tuning.experts) + triton.cdiv(R, tuning.experts)
    _logits[(blocks, tuning.splits, triton.cdiv(T, tuning.tokens))](
        x_TD,
        router_ED,
        router.matrix.scales,
        compress_RD,
        sums_STE,
        T,
        E,
        R,
        D,
        *sums_STE.stride(),
        COMPENSATED=R > 0,
        BLOCK_T=tuning.tokens,
        BLOCK_E=tuning.experts,
        BLOCK_D=tuning.width,
        STEPS=triton.cdiv(triton.cdiv(D, tuning.width), tuning.splits),
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        **device_info(x_TD.device).overlap,
    )
    if R:
        z_STR = sums_STE[:, :, E:]
    return Choice(sums_STE[:, :, :E], router.bias, router.threshold, z_STR)


def at_once(x_TD: Tensor, router: RouterWeights) -> Choice:
    """Return the router's result by cuBLAS. In half precision tensor cores compute it, which also sum in fp32."""
    router_ED = router.matrix.rows if router.matrix.scales is None else router.matrix.floats(torch.float32)
    if x_TD.is_cuda and x_TD.dtype == router_ED.dtype and x_TD.dtype.itemsize == 2 and _MIXED_MM:
        logits_TE = torch.mm(x_TD, router_ED.T, out_dtype=torch.float32)
    else:
        logits_TE = linear_fp32(x_TD, router_ED)
    return Choice(logits_TE[None], router.bias, router.threshold)


def _compressed(x_TD: Tensor, compress_RD: Tensor | None) -> Tensor | None:
    return None if compress_RD is None else linear_fp32(x_TD, compress_RD)[None]
