"""2 to 64 tokens, int8 or int4 weights: the four launches of :mod:`lte.ops.triton_union`.

The scales of int8 belong to rows: they multiply neurons, not weights. The scales of int4 belong to a group of rows and
a column. A tile of int4 has the columns of its bytes' low halves or high halves, which are multiplied one after the
other.
"""
# pyright: basic, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.ops import triton_router
from lte.ops.triton_activations import activate
from lte.ops.triton_device import device_info
from lte.ops.triton_router import chosen, list_wanted
from lte.ops.triton_union import _sum
from lte.ops.triton_words import nibbles
from lte.ops.weights import INT4_GROUP, FFNWeights


@triton.jit
def _load_two(
    rows,
    scales,
    rows_R,
    group,
    cols_J,
    inside_R,
    D: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    ASSEMBLE: tl.constexpr,
):
    """Return numbers of these rows, ``[R, J]`` at columns J and at J + D / 2. Those of int8 still lack their scales."""
    inside_RJ = inside_R[:, None] & (cols_J < D // 2)[None, :]
    if BITS == 8:
        at_RJ = rows + rows_R.to(tl.int64)[:, None] * D + cols_J[None, :]
        low_RJ = tl.load(at_RJ, mask=inside_RJ, other=0).to(DTYPE)
        high_RJ = tl.load(at_RJ + D // 2, mask=inside_RJ, other=0).to(DTYPE)
    else:
        at_RJ = rows + rows_R.to(tl.int64)[:, None] * (D // 2) + cols_J[None, :]
        low_RJ, high_RJ = nibbles(tl.load(at_RJ, mask=inside_RJ, other=0), DTYPE, ASSEMBLE)
        at_J = scales + group.to(tl.int64) * D + cols_J
        low_J = tl.load(at_J, mask=cols_J < D // 2, other=0.0).to(DTYPE)
        high_J = tl.load(at_J + D // 2, mask=cols_J < D // 2, other=0.0).to(DTYPE)
        low_RJ, high_RJ = low_RJ * low_J[None, :], high_RJ * high_J[None, :]
    return low_RJ, high_RJ


@triton.jit
def _up(
    x,
    gate,
    up,
    gate_scales,
    up_scales,
    down_scales,
    gate_bias,
    up_bias,
    wanted,
    hidden,
    logits,
    router_bias,
    T,
    E,
    stride_s,
    stride_t,
    stride_e,
    threshold,
    D: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_ROUTER_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    ASSEMBLE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    DTYPE: tl.constexpr = x.dtype.element_ty
    first = tl.program_id(0) * ROWS
    tokens_T = tl.arange(0, BLOCK_T)
    # ROWS neurons of one expert
    on_T1 = chosen(
        logits,
        router_bias,
        stride_s,
        stride_t,
        stride_e,
        threshold,
        tokens_T,
        first // N + tl.arange(0, 1),
        T,
        E,
        SPLITS,
        BLOCK_S,
        HAS_ROUTER_BIAS,
    ).to(tl.int32)
    on = tl.max(tl.max(on_T1, axis=0), axis=0)
    tl.store(wanted + first // N, on)
    if on != 0:
        rows_R = first + tl.arange(0, ROWS)
        all_R = rows_R < E * N
        up_TR = tl.zeros([BLOCK_T, ROWS], dtype=tl.float32)
        gate_TR = tl.zeros([BLOCK_T, ROWS], dtype=tl.float32)
        for start in tl.range(0, D // 2, BLOCK_J):
            cols_J = start + tl.arange(0, BLOCK_J)
            inside_TJ = (tokens_T < T)[:, None] & (cols_J < D // 2)[None, :]
            at_TJ = x + tokens_T[:, None] * D + cols_J[None, :]
            low_TJ = tl.load(at_TJ, mask=inside_TJ, other=0.0)
            high_TJ = tl.load(at_TJ + D // 2, mask=inside_TJ, other=0.0)
            low_RJ, high_RJ = _load_two(up, up_scales, rows_R, first // GROUP, cols_J, all_R, D, BITS, DTYPE, ASSEMBLE)
            up_TR = tl.dot(low_TJ, low_RJ.T, up_TR, input_precision="ieee")
            up_TR = tl.dot(high_TJ, high_RJ.T, up_TR, input_precision="ieee")
            if GATED:
                low_RJ, high_RJ = _load_two(
                    gate, gate_scales, rows_R, first // GROUP, cols_J, all_R, D, BITS, DTYPE, ASSEMBLE
                )
                gate_TR = tl.dot(low_TJ, low_RJ.T, gate_TR, input_precision="ieee")
                gate_TR = tl.dot(high_TJ, high_RJ.T, gate_TR, input_precision="ieee")
        if BITS == 8:
            up_TR *= tl.load(up_scales + rows_R).to(tl.float32)[None, :]
        if HAS_UP_BIAS:
            up_TR += tl.load(up_bias + rows_R).to(tl.float32)[None, :]
        if GATED:
            if BITS == 8:
                gate_TR *= tl.load(gate_scales + rows_R).to(tl.float32)[None, :]
            if HAS_GATE_BIAS:
                gate_TR += tl.load(gate_bias + rows_R).to(tl.float32)[None, :]
            h_TR = activate(gate_TR, ACT) * up_TR
        else:
            h_TR = activate(up_TR, ACT)
        if BITS == 8:
            h_TR *= tl.load(down_scales + rows_R).to(tl.float32)[None, :]
        h_TR = tl.where(on_T1 != 0, h_TR, 0.0)
        at_TR = hidden + tokens_T[:, None] * (E * N) + rows_R[None, :]
        tl.store(at_TR, h_TR.to(hidden.dtype.element_ty), mask=(tokens_T < T)[:, None])


@triton.jit
def _down(
    hidden,
    down,
    scales,
    wanted,
    order,
    partial,
    T,
    E,
    D: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
    ASSEMBLE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    split, splits = tl.program_id(1), tl.num_programs(1)
    order += (tl.program_id(0) * splits + split) * E
    UNITS: tl.constexpr = (N + ROWS - 1) // ROWS
    count = list_wanted(wanted, order, E, BLOCK_E) * UNITS
    tokens_T = tl.arange(0, BLOCK_T)
    cols_J = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    low_TJ = tl.zeros([BLOCK_T, BLOCK_J], dtype=tl.float32)
    high_TJ = tl.zeros([BLOCK_T, BLOCK_J], dtype=tl.float32)
    for unit in tl.range((split * count) // splits, ((split + 1) * count) // splits):
        first = tl.load(order + unit // UNITS) * N + unit % UNITS * ROWS
        rows_R = first + tl.arange(0, ROWS)
        here_R = tl.arange(0, ROWS) < N  # an expert may be smaller than a product can be
        h_TR = tl.load(
            hidden + tokens_T[:, None] * (E * N) + rows_R[None, :],
            mask=(tokens_T < T)[:, None] & here_R[None, :],
            other=0.0,
        )
        low_RJ, high_RJ = _load_two(
            down, scales, rows_R, first // GROUP, cols_J, here_R, D, BITS, hidden.dtype.element_ty, ASSEMBLE
        )
        low_TJ = tl.dot(h_TR, low_RJ, low_TJ, input_precision="ieee")
        high_TJ = tl.dot(h_TR, high_RJ, high_TJ, input_precision="ieee")
    at_TJ = partial + split * T * D + tokens_T[:, None] * D + cols_J[None, :]
    inside_TJ = (tokens_T < T)[:, None] & (cols_J < D // 2)[None, :]
    tl.store(at_TJ, low_TJ, mask=inside_TJ)
    tl.store(at_TJ + D // 2, high_TJ, mask=inside_TJ)


@dataclass(frozen=True)
class Tuning:
    """How the work is divided.

    Attributes:
        up_width, up_stages, up_warps: of a program of ``_up``: bytes of a row at a time, tiles that are loaded at the
            same time, and warps.
        down_width, down_stages, down_warps: the same for ``_down``, whose width is that of its output.
        splits: programs that share the experts of a slice of the output.
    """

    up_width: int = 256
    up_stages: int = 4
    up_warps: int = 4
    down_width: int = 256
    down_stages: int = 4
    down_warps: int = 4
    splits: int = 16

    @staticmethod
    @cache
    def of(device: torch.device, tokens: int, bits: int, itemsize: int) -> "Tuning":
        """Return the tuning for a number of tokens. It leaves room for two programs on a multiprocessor."""
        padded, few = max(16, triton.next_power_of_2(tokens)), tokens <= 16
        width = 256 if few and bits == 4 else 128
        room = int(0.45 * device_info(device).shared_memory)
        tile = width * (2 * padded * itemsize + INT4_GROUP * bits // 2)  # two halves of x, and of gate and up
        stages = max(1, min(4, room // tile))
        return Tuning(width, stages, 4, 256 if few else 128, 4, 4 if few else 8)


def union_ffn(x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None, tuning: Tuning | None = None) -> Tensor:
    """``[T, D]`` -> ``[T, D]``, T up to 64. A compensation is left out."""
    (T, D), E, N, bits = x_TD.shape, weights.num_experts, weights.expert_size, weights.up.matrix.bits
    up, down, gate = weights.up, weights.down, weights.gate
    device, dtype = x_TD.device, x_TD.dtype
    tuning = tuning or Tuning.of(device, T, bits, dtype.itemsize)
    overlap = device_info(device).overlap
    if active_TE is None:
        choice = triton_router.in_parts(x_TD, weights.router, None, by_expert=True)
    else:
        choice = triton_router.given(active_TE, x_TD)
    wanted = torch.empty(E, dtype=torch.int32, device=device)
    hidden = torch.empty(T, E * N, dtype=dtype, device=device)
    block_t, block_e, half = (
        max(16, triton.next_power_of_2(T)),
        triton.next_power_of_2(E),
        triton.next_power_of_2(D) // 2,
    )
    rows, assemble = min(N, INT4_GROUP), x_TD.is_cuda and dtype != torch.float32
    arguments = choice.arguments()
    _up[(E * N // rows,)](
        x_TD,
        gate and gate.matrix.rows,
        up.matrix.rows,
        gate and gate.matrix.scales,
        up.matrix.scales,
        down.matrix.scales,
        gate and gate.bias,
        up.bias,
        wanted,
        hidden,
        T=T,
        E=E,
        D=D,
        **arguments,
        ACT=weights.act,
        GATED=gate is not None,
        HAS_GATE_BIAS=gate is not None and gate.bias is not None,
        HAS_UP_BIAS=up.bias is not None,
        BITS=bits,
        GROUP=INT4_GROUP,
        ASSEMBLE=assemble,
        N=N,
        ROWS=rows,
        BLOCK_T=block_t,
        BLOCK_J=min(tuning.up_width, half),
        num_warps=tuning.up_warps,
        num_stages=tuning.up_stages,
        **overlap,
    )
    width = min(tuning.down_width, half)
    slices = triton.cdiv(D // 2, width)
    order = torch.empty(slices * tuning.splits, E, dtype=torch.int32, device=device)
    partial = torch.empty(tuning.splits, T, D, dtype=torch.float32, device=device)
    _down[(slices, tuning.splits)](
        hidden,
        down.matrix.rows,
        down.matrix.scales,
        wanted,
        order,
        partial,
        T,
        E,
        D=D,
        BITS=bits,
        GROUP=INT4_GROUP,
        ASSEMBLE=assemble,
        N=N,
        ROWS=max(16, rows),
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_J=width,
        num_warps=tuning.down_warps,
        num_stages=2 * tuning.down_stages - 1,  # Triton spends every other stage on the experts' numbers
        **overlap,
    )
    y_TD = torch.empty_like(x_TD)
    block = 256
    _sum[(triton.cdiv(T * D, block),)](
        partial,
        down.bias,
        y_TD,
        D,
        T * D,
        SPLITS=tuning.splits,
        HAS_BIAS=down.bias is not None,
        BLOCK=block,
        num_warps=2,
        **overlap,
    )
    return y_TD
