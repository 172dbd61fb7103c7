"""One token, int8 or int4 weights: three launches, as in :mod:`lte.ops.triton_token`, which has the first and the last.

The second, ``_experts``, computes the active experts' neurons. Its work is divided into units of some rows of one
expert. Rows of a unit share the scales of int4, so x is multiplied by them once for a unit. The scales of down in int8
belong to columns of the output, so they multiply a program's sums at the end.
"""
# pyright: basic, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# ruff: noqa: RUF005 (Triton adds tuples, and does not unpack them)

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.ops.triton_activations import activate
from lte.ops.triton_device import device_info
from lte.ops.triton_token import _add2, add_parts, route
from lte.ops.triton_words import MASKS, lane, load_lanes, load_words, offset, store_lanes
from lte.ops.weights import INT4_GROUP, FFNWeights


@triton.jit
def _products(words_RW, factors, low_mask, high_mask, BITS: tl.constexpr):
    """Return parts ``[R, W]`` of the products of rows and ``factors``. The sum over W is the product."""
    start_W = factors[0] * -offset(0, BITS)
    for k in tl.static_range(1, 32 // BITS):
        start_W -= factors[k] * offset(k, BITS)
    part_RW = start_W[None, :] + lane(words_RW, 0, low_mask, high_mask, BITS) * factors[0][None, :]
    for k in tl.static_range(1, 32 // BITS):
        part_RW += lane(words_RW, k, low_mask, high_mask, BITS) * factors[k][None, :]
    return part_RW


@triton.jit
def _scaled(lanes, scales, words_W, inside_W, D, BITS: tl.constexpr):
    """Return ``lanes`` times scales that belong to columns."""
    by = load_lanes(scales, words_W, inside_W, D, BITS)
    scaled = ()
    for k in tl.static_range(32 // BITS):
        scaled = scaled + (lanes[k] * by[k],)
    return scaled


@triton.jit
def _experts(
    x,
    gate,
    up,
    down,
    gate_scales,
    up_scales,
    down_scales,
    gate_bias,
    up_bias,
    active,
    partial,
    E,
    low_mask,
    high_mask,
    D: tl.constexpr,  # a constant, so that the second half of a row is known to be aligned
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    width = D * BITS // 32
    words_W = tl.arange(0, BLOCK_W)
    inside_W = words_W < width
    inside_RW = inside_W[None, :] & (tl.arange(0, ROWS) < ROWS)[:, None]
    x_lanes = load_lanes(x, words_W, inside_W, D, BITS)
    experts_E = tl.arange(0, BLOCK_E)
    on_E = tl.load(active + experts_E, mask=experts_E < E, other=0).to(tl.int32)
    upto_E = tl.cumsum(on_E, 0)

    UNITS: tl.constexpr = N // ROWS  # of an expert
    total = tl.sum(on_E, 0) * UNITS
    sums = ()
    for _ in tl.static_range(32 // BITS):
        sums = sums + (tl.zeros([BLOCK_W], dtype=tl.float32),)
    first, last = (program * total) // programs, ((program + 1) * total) // programs
    for unit in tl.range(first, last, num_stages=STAGES):
        expert = tl.sum((upto_E <= unit // UNITS).to(tl.int32), 0)
        row = expert * N + unit % UNITS * ROWS
        rows_R = row + tl.arange(0, ROWS)
        group = (row // GROUP).to(tl.int64) * D
        u_RW = load_words(up, rows_R, words_W, inside_RW, width, BITS)
        if GATED:
            g_RW = load_words(gate, rows_R, words_W, inside_RW, width, BITS)
        d_RW = load_words(down, rows_R, words_W, inside_RW, width, BITS)
        by_up = _scaled(x_lanes, up_scales + group, words_W, inside_W, D, BITS) if BITS == 4 else x_lanes
        up_RW = _products(u_RW, by_up, low_mask, high_mask, BITS)
        if GATED:
            by_gate = _scaled(x_lanes, gate_scales + group, words_W, inside_W, D, BITS) if BITS == 4 else x_lanes
            gate_RW = _products(g_RW, by_gate, low_mask, high_mask, BITS)
            gate_R, up_R = tl.reduce((gate_RW, up_RW), 1, _add2)
            if BITS == 8:
                gate_R *= tl.load(gate_scales + rows_R).to(tl.float32)
            if HAS_GATE_BIAS:
                gate_R += tl.load(gate_bias + rows_R).to(tl.float32)
        else:
            up_R = tl.sum(up_RW, axis=1)
        if BITS == 8:
            up_R *= tl.load(up_scales + rows_R).to(tl.float32)
        if HAS_UP_BIAS:
            up_R += tl.load(up_bias + rows_R).to(tl.float32)
        h_R = activate(gate_R, ACT) * up_R if GATED else activate(up_R, ACT)
        h_R = h_R.to(x.dtype.element_ty).to(tl.float32)  # rounded as in the reference
        h = tl.sum(h_R, 0)
        outs = ()
        for k in tl.static_range(32 // BITS):
            part_W = tl.sum(lane(d_RW, k, low_mask, high_mask, BITS) * h_R[:, None], axis=0)
            outs = outs + (part_W - offset(k, BITS) * h,)
        if BITS == 4:
            outs = _scaled(outs, down_scales + group, words_W, inside_W, D, BITS)
        added = ()
        for k in tl.static_range(32 // BITS):
            added = added + (sums[k] + outs[k],)
        sums = added
    if BITS == 8:
        sums = _scaled(sums, down_scales, words_W, inside_W, D, BITS)
    store_lanes(partial + program * D, sums, words_W, inside_W, D, BITS)


@dataclass(frozen=True)
class Tuning:
    """How the work is divided.

    Attributes:
        programs: of ``_experts``; two for each multiprocessor.
        rows: of a unit.
        stages: units that are loaded at the same time; 1 loads to registers.
        warps: of ``_experts``.
        columns: of the output, for each program of the last launch.
    """

    programs: int
    rows: int
    stages: int = 1
    warps: int = 4
    columns: int = 16

    @staticmethod
    @cache
    def of(device: torch.device, d_model: int, bits: int) -> "Tuning":
        """Return the best measured tuning of an H200 for int4 at width 4096, scaled to the bytes of a row."""
        words = triton.next_power_of_2(d_model * bits // 32)
        rows, warps = max(1, min(8, 8192 // words)), max(1, min(16, words // 128))
        return Tuning(2 * device_info(device).multiprocessors, rows, warps=warps)


def quantised_token_ffn(
    x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None, tuning: Tuning | None = None
) -> Tensor:
    """``[1, D]`` -> ``[1, D]``."""
    D, E, N, bits = weights.d_model, weights.num_experts, weights.expert_size, weights.up.matrix.bits
    up, down, gate, device = weights.up, weights.down, weights.gate, x_TD.device
    tuning = tuning or Tuning.of(device, D, bits)
    if x_TD.data_ptr() % 8:  # it is read in words of 64 bits
        x_TD = x_TD.clone()
    active_TE, z_R = route(x_TD, weights, active_TE)
    partial = torch.empty(tuning.programs, D, dtype=torch.float32, device=device)
    low_mask, high_mask = MASKS[bits]
    _experts[(tuning.programs,)](
        x_TD,
        gate and gate.matrix.rows.view(torch.int32),
        up.matrix.rows.view(torch.int32),
        down.matrix.rows.view(torch.int32),
        gate and gate.matrix.scales,
        up.matrix.scales,
        down.matrix.scales,
        gate and gate.bias,
        up.bias,
        active_TE,
        partial,
        E,
        low_mask,
        high_mask,
        D=D,
        ACT=weights.act,
        GATED=gate is not None,
        HAS_GATE_BIAS=gate is not None and gate.bias is not None,
        HAS_UP_BIAS=up.bias is not None,
        BITS=bits,
        GROUP=INT4_GROUP,
        N=N,
        BLOCK_E=triton.next_power_of_2(E),
        BLOCK_W=triton.next_power_of_2(D * bits // 32),
        ROWS=min(tuning.rows, N),
        STAGES=tuning.stages,
        num_warps=tuning.warps,
        **device_info(device).overlap,
    )
    return add_parts(partial, torch.empty_like(x_TD), weights, active_TE, z_R, tuning.columns)
