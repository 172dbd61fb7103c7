"""2 to 64 tokens: the experts that any of them wants are read once, and each token's own choice is masked in.

1. ``_logits`` and ``_choose``: which experts each token wants, and which any token wants.
2. ``_up``: neurons of the wanted experts, side by side in the order of the experts.
3. ``_down``: their sum into the output. The experts are shared out among ``splits`` programs for each slice of the
   output's columns; each leaves a partial sum.
4. ``_sum``: adds the partial sums in a fixed order.

How many experts are wanted is known on the device only. The grids are for all of them, and programs without work leave.
"""
# pyright: basic, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.ops.triton_activations import activate
from lte.ops.triton_device import device_info
from lte.ops.weights import FFNWeights

MAX_TOKENS = 64


@triton.jit
def _logits(
    x,
    router,
    partial,
    T,
    E,
    D,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
    PDL: tl.constexpr,
):
    split = tl.program_id(1)
    tokens_T = tl.arange(0, BLOCK_T)
    experts_E = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    logits_TE = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
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
        if x.dtype.element_ty != router.dtype.element_ty:  # no rounding of a router kept in fp32
            x_TD, w_ED = x_TD.to(tl.float32), w_ED.to(tl.float32)
        logits_TE = tl.dot(x_TD, w_ED.T, logits_TE, input_precision=PRECISION)
    at_TE = split * T * E + tokens_T[:, None] * E + experts_E[None, :]
    tl.store(partial + at_TE, logits_TE, mask=(tokens_T < T)[:, None] & (experts_E < E)[None, :])


@triton.jit
def _choose(
    partial,
    bias,
    active,
    wanted,
    T,
    E,
    threshold,
    GIVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tokens_T = tl.arange(0, BLOCK_T)
    experts_E = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside_TE = (tokens_T < T)[:, None] & (experts_E < E)[None, :]
    at_TE = tokens_T[:, None] * E + experts_E[None, :]
    if GIVEN:
        on_TE = tl.load(active + at_TE, mask=inside_TE, other=0).to(tl.int32)
    else:
        logits_TE = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            logits_TE += tl.load(partial + split * T * E + at_TE, mask=inside_TE, other=0.0)
        if HAS_BIAS:
            logits_TE += tl.load(bias + experts_E, mask=experts_E < E, other=0.0).to(tl.float32)[None, :]
        on_TE = ((logits_TE > threshold) & inside_TE).to(tl.int32)
        tl.store(active + at_TE, on_TE.to(tl.uint8), mask=inside_TE)
    tl.store(wanted + experts_E, tl.max(on_TE, axis=0), mask=experts_E < E)


@triton.jit
def _up(
    x,
    gate,
    up,
    gate_bias,
    up_bias,
    active,
    wanted,
    order,
    hidden,
    T,
    E,
    D,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot, part = tl.program_id(0) // (N // BLOCK_N), tl.program_id(0) % (N // BLOCK_N)
    experts_E = tl.arange(0, BLOCK_E)
    on_E = tl.load(wanted + experts_E, mask=experts_E < E, other=0)
    count = tl.sum(on_E, 0)
    if tl.program_id(0) == 0:
        tl.store(order + E, count)
    if slot < count:
        expert = tl.sum(tl.where((tl.cumsum(on_E, 0) - 1 == slot) & (on_E != 0), experts_E, 0), 0)
        tl.store(order + slot, expert)
        tokens_T = tl.arange(0, BLOCK_T)
        rows_N = part * BLOCK_N + tl.arange(0, BLOCK_N)
        neurons_N = expert * N + rows_N
        up_TN = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
        gate_TN = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
        for start in tl.range(0, D, BLOCK_D):
            cols_D = start + tl.arange(0, BLOCK_D)
            x_TD = tl.load(
                x + tokens_T[:, None] * D + cols_D[None, :],
                mask=(tokens_T < T)[:, None] & (cols_D < D)[None, :],
                other=0.0,
            )
            at_ND = neurons_N.to(tl.int64)[:, None] * D + cols_D[None, :]
            u_ND = tl.load(up + at_ND, mask=(cols_D < D)[None, :], other=0.0)
            up_TN = tl.dot(x_TD, u_ND.T, up_TN, input_precision=PRECISION)
            if GATED:
                g_ND = tl.load(gate + at_ND, mask=(cols_D < D)[None, :], other=0.0)
                gate_TN = tl.dot(x_TD, g_ND.T, gate_TN, input_precision=PRECISION)
        if HAS_UP_BIAS:
            up_TN += tl.load(up_bias + neurons_N).to(tl.float32)[None, :]
        if GATED:
            if HAS_GATE_BIAS:
                gate_TN += tl.load(gate_bias + neurons_N).to(tl.float32)[None, :]
            h_TN = activate(gate_TN, ACT) * up_TN
        else:
            h_TN = activate(up_TN, ACT)
        on_T = tl.load(active + tokens_T * E + expert, mask=tokens_T < T, other=0)
        h_TN = tl.where((on_T != 0)[:, None], h_TN, 0.0)
        at_TN = tokens_T[:, None] * (E * N) + slot * N + rows_N[None, :]
        tl.store(hidden + at_TN, h_TN.to(hidden.dtype.element_ty), mask=(tokens_T < T)[:, None])


@triton.jit
def _down(
    hidden,
    down,
    order,
    partial,
    T,
    E,
    D,
    PRECISION: tl.constexpr,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    split, splits = tl.program_id(1), tl.num_programs(1)
    tokens_T = tl.arange(0, BLOCK_T)
    cols_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows_N = tl.arange(0, N)
    count = tl.load(order + E)
    sum_TD = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for slot in tl.range((split * count) // splits, ((split + 1) * count) // splits):
        expert = tl.load(order + slot)
        h_TN = tl.load(
            hidden + tokens_T[:, None] * (E * N) + slot * N + rows_N[None, :],
            mask=(tokens_T < T)[:, None],
            other=0.0,
        )
        neurons_N = (expert * N + rows_N).to(tl.int64)
        d_ND = tl.load(down + neurons_N[:, None] * D + cols_D[None, :], mask=(cols_D < D)[None, :], other=0.0)
        sum_TD = tl.dot(h_TN, d_ND, sum_TD, input_precision=PRECISION)
    at_TD = split * T * D + tokens_T[:, None] * D + cols_D[None, :]
    tl.store(partial + at_TD, sum_TD, mask=(tokens_T < T)[:, None] & (cols_D < D)[None, :])


@triton.jit
def _sum(
    partial, bias, y, D, size, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * size + at, mask=at < size, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % D, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y + at, total, mask=at < size)


@dataclass(frozen=True)
class Tuning:
    """How the work is cut; measured on an H100.

    Attributes:
        up_width, up_stages: columns of the weights that ``_up`` takes at a time, and how many such tiles are on their
            way.
        slice_width, down_stages: columns of the output that a program of ``_down`` makes; tiles on their way.
        splits: programs that share the experts of a slice.
    """

    up_width: int = 128
    up_stages: int = 4
    slice_width: int = 128
    down_stages: int = 6
    splits: int = 8

    @staticmethod
    @cache
    def of(device: torch.device, tokens: int, d_model: int, expert_size: int, itemsize: int) -> "Tuning":
        """For a shape and a device."""
        info = device_info(device)
        slice_width = 128
        splits = max(1, min(16, 2 * info.multiprocessors // triton.cdiv(d_model, slice_width)))
        # with more tokens narrower tiles: three programs of _up to a multiprocessor still fit
        up_width = min(128 if tokens <= 16 else 64, triton.next_power_of_2(d_model))
        padded = max(16, triton.next_power_of_2(tokens))
        up_tile = (2 * min(32, expert_size) + padded) * up_width * itemsize
        down_tile = (expert_size * slice_width + padded * expert_size) * itemsize
        budget = int(0.45 * info.shared_memory)
        return Tuning(
            up_width, max(1, min(4, budget // up_tile)), slice_width, max(1, min(6, budget // down_tile)), splits
        )


def union_ffn(x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None, tuning: Tuning | None = None) -> Tensor:
    """``[T, D]`` -> ``[T, D]``, T up to :data:`MAX_TOKENS`."""
    (T, D), E, N = x_TD.shape, weights.num_experts, weights.expert_size
    device = x_TD.device
    tuning = tuning or Tuning.of(device, T, D, N, x_TD.dtype.itemsize)
    tiles: dict[str, Any] = {
        "PRECISION": "ieee" if x_TD.dtype == torch.float32 else "tf32",  # tf32 would round fp32 weights
        "BLOCK_T": max(16, triton.next_power_of_2(T)),
    }
    overlap = device_info(device).overlap
    block_e, splits, steps = 16, 1, 1
    given = active_TE is not None
    if given:
        active_TE, logits = active_TE.view(torch.uint8), x_TD
    else:
        active_TE = torch.empty(T, E, dtype=torch.uint8, device=device)
        tile = min(256, triton.next_power_of_2(D))
        splits = min(8, triton.cdiv(D, tile))
        steps = triton.cdiv(triton.cdiv(D, tile), splits)
        logits = torch.empty(splits, T, E, dtype=torch.float32, device=device)
        _logits[(triton.cdiv(E, block_e), splits)](
            x_TD,
            weights.router,
            logits,
            T,
            E,
            D,
            BLOCK_E=block_e,
            BLOCK_D=tile,
            STEPS=steps,
            num_warps=4,
            **{**tiles, "PRECISION": tiles["PRECISION"] if x_TD.dtype == weights.router.dtype else "ieee"},
            **overlap,
        )
    wanted = torch.empty(E, dtype=torch.int32, device=device)
    _choose[(triton.cdiv(E, block_e),)](
        logits,
        weights.router_bias,
        active_TE,
        wanted,
        T,
        E,
        weights.threshold,
        GIVEN=given,
        HAS_BIAS=weights.router_bias is not None,
        SPLITS=splits,
        BLOCK_T=tiles["BLOCK_T"],
        BLOCK_E=block_e,
        num_warps=4,
        **overlap,
    )
    order = torch.empty(E + 1, dtype=torch.int32, device=device)
    hidden = torch.empty(T, E * N, dtype=x_TD.dtype, device=device)
    block_n = min(N, 32)
    _up[(E * (N // block_n),)](
        x_TD,
        weights.gate,
        weights.up,
        weights.gate_bias,
        weights.up_bias,
        active_TE,
        wanted,
        order,
        hidden,
        T,
        E,
        D,
        ACT=weights.act,
        GATED=weights.gate is not None,
        HAS_GATE_BIAS=weights.gate_bias is not None,
        HAS_UP_BIAS=weights.up_bias is not None,
        N=N,
        BLOCK_N=block_n,
        BLOCK_E=triton.next_power_of_2(E),
        BLOCK_D=tuning.up_width,
        num_warps=4,
        num_stages=tuning.up_stages,
        **tiles,
        **overlap,
    )
    partial = torch.empty(tuning.splits, T, D, dtype=torch.float32, device=device)
    _down[(triton.cdiv(D, tuning.slice_width), tuning.splits)](
        hidden,
        weights.down,
        order,
        partial,
        T,
        E,
        D,
        N=N,
        BLOCK_D=tuning.slice_width,
        num_warps=4,
        num_stages=tuning.down_stages,
        **tiles,
        **overlap,
    )
    y_TD = torch.empty_like(x_TD)
    block = 256
    _sum[(triton.cdiv(T * D, block),)](
        partial,
        weights.down_bias,
        y_TD,
        D,
        T * D,
        SPLITS=tuning.splits,
        HAS_BIAS=weights.down_bias is not None,
        BLOCK=block,
        num_warps=2,
        **overlap,
    )
    return y_TD
