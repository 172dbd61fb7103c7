"""One token: three small launches, with a single pass over the weights of the active experts.

1. ``_route`` computes a logit for each expert and writes one byte for each expert. With compensation it also computes
   ``compress x``.
2. ``_experts`` computes the active experts' neurons. Each program has the same number of rows, of any experts. For a
   row it reads gate, up and down together (they do not wait for each other). It adds ``h * down`` to its own output,
   which stays in registers. So all weights are read in one phase, without a barrier over the grid.
3. ``_sum`` adds the programs' outputs in a fixed order, and the compensation of idle experts.

On Hopper each launch begins before the previous one ends (programmatic dependent launch). Before a kernel reads what
others wrote, it waits until the previous kernel is done. ``_route`` loads its weights before it waits.
"""
# pyright: basic, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.ops.triton_activations import activate
from lte.ops.triton_device import device_info
from lte.ops.triton_router import list_wanted
from lte.ops.weights import FFNWeights

MAX_WIDTH = 16384
MAX_RANK = 256  # a higher rank of the compensation does not fit into the registers of `_sum`


@triton.jit
def _dot(x, weight, bias, row, D, HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)
    w_D = tl.load(weight + row * D + cols, mask=cols < D, other=0.0)
    if PDL:  # x is what the kernel before wrote, the weights are not
        tl.extra.cuda.gdc_wait()
    x_D = tl.load(x + cols, mask=cols < D, other=0.0)
    product = tl.sum(w_D.to(tl.float32) * x_D.to(tl.float32), axis=0)
    if HAS_BIAS:
        product += tl.load(bias + row).to(tl.float32)
    return product


@triton.jit
def _route(
    x,
    router,
    scales,
    bias,
    active,
    compress,
    compress_bias,
    z,
    E,  # programs that choose; 0 if the choice is given
    D,
    threshold,
    HAS_BIAS: tl.constexpr,
    COMPENSATED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if COMPENSATED and row >= E:
        tl.store(z + row - E, _dot(x, compress, compress_bias, row - E, D, True, BLOCK_D, PDL))
    else:
        scale = 1.0
        if scales is not None:  # of int8
            scale = tl.load(scales + row).to(tl.float32)
        logit = scale * _dot(x, router, bias, row, D, False, BLOCK_D, PDL)
        if HAS_BIAS:
            logit += tl.load(bias + row).to(tl.float32)
        tl.store(active + row, (logit > threshold).to(tl.uint8))


@triton.jit
def _add2(a, b, c, d):
    return a + c, b + d


@triton.jit
def _experts(
    x,
    gate,
    up,
    down,
    gate_bias,
    up_bias,
    active,
    order,
    partial,
    E,
    D,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    cols_D = tl.arange(0, BLOCK_D)
    x_D = tl.load(x + cols_D, mask=cols_D < D, other=0.0).to(tl.float32)

    order += program * E
    total = list_wanted(active, order, E, BLOCK_E) * N
    last = ((program + 1) * total) // programs
    sum_D = tl.zeros([BLOCK_D], dtype=tl.float32)
    for first in tl.range((program * total) // programs, last, ROWS, num_stages=STAGES):
        rows_R = first + tl.arange(0, ROWS)
        here_R = rows_R < last
        neurons_R = tl.load(order + rows_R // N, mask=here_R, other=0) * N + rows_R % N
        at_RD = neurons_R.to(tl.int64)[:, None] * D + cols_D[None, :]
        inside_RD = here_R[:, None] & (cols_D < D)[None, :]
        u_RD = tl.load(up + at_RD, mask=inside_RD, other=0.0)
        if GATED:
            g_RD = tl.load(gate + at_RD, mask=inside_RD, other=0.0)
            d_RD = tl.load(down + at_RD, mask=inside_RD, other=0.0)
            gate_R, up_R = tl.reduce((g_RD.to(tl.float32) * x_D[None, :], u_RD.to(tl.float32) * x_D[None, :]), 1, _add2)
            if HAS_GATE_BIAS:
                gate_R += tl.load(gate_bias + neurons_R, mask=here_R, other=0.0).to(tl.float32)
        else:
            d_RD = tl.load(down + at_RD, mask=inside_RD, other=0.0)
            up_R = tl.sum(u_RD.to(tl.float32) * x_D[None, :], axis=1)
        if HAS_UP_BIAS:
            up_R += tl.load(up_bias + neurons_R, mask=here_R, other=0.0).to(tl.float32)
        h_R = activate(gate_R, ACT) * up_R if GATED else activate(up_R, ACT)
        # rounded as in the reference; beyond the last row the weights read as zeros
        h_R = h_R.to(down.dtype.element_ty).to(tl.float32)
        sum_D += tl.sum(h_R[:, None] * d_RD.to(tl.float32), axis=0)
    tl.store(partial + program * D + cols_D, sum_D, mask=cols_D < D)


@triton.jit
def _sum(
    partial,
    bias,
    y,
    active,
    z,
    expand,
    D,
    E,
    R,
    programs,
    HAS_BIAS: tl.constexpr,
    COMPENSATED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    cols_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    if COMPENSATED:
        ranks_R = tl.arange(0, BLOCK_R)
        inside_DR = (cols_D < D)[:, None] & (ranks_R < R)[None, :]
        expand_DR = tl.load(expand + cols_D[:, None] * R + ranks_R[None, :], mask=inside_DR, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    programs_P = tl.arange(0, BLOCK_P)
    inside_PD = (programs_P < programs)[:, None] & (cols_D < D)[None, :]
    part_PD = tl.load(partial + programs_P[:, None] * D + cols_D[None, :], mask=inside_PD, other=0.0)
    y_D = tl.sum(part_PD, axis=0)
    if HAS_BIAS:
        y_D += tl.load(bias + cols_D, mask=cols_D < D, other=0.0).to(tl.float32)
    if COMPENSATED:
        experts_E = tl.arange(0, BLOCK_E)
        on_E = tl.load(active + experts_E, mask=experts_E < E, other=0).to(tl.int32)
        z_R = tl.load(z + ranks_R, mask=ranks_R < R, other=0.0)
        y_D += (1 - tl.sum(on_E, axis=0) / E) * tl.sum(expand_DR.to(tl.float32) * z_R[None, :], axis=1)
    tl.store(y + cols_D, y_D, mask=cols_D < D)


@dataclass(frozen=True)
class Tuning:
    """How the work is divided. The default does not depend on shape or device.

    Attributes:
        programs: of ``_experts``; one for each multiprocessor.
        rows: neurons that a program handles at a time.
        stages: number of such groups that are loaded at the same time.
        warps: of ``_experts``.
        columns: of the output, for each program of ``_sum``.
    """

    programs: int
    rows: int
    stages: int
    warps: int
    columns: int = 16

    @staticmethod
    @cache
    def of(device: torch.device, d_model: int, matrices: int, itemsize: int) -> "Tuning":
        """Return the best measured tuning of an H100, scaled to the shape and to the shared memory of the device."""
        width = triton.next_power_of_2(d_model)
        rows = max(1, min(8, 4096 // width))
        lot = matrices * rows * width * itemsize
        info = device_info(device)
        stages = max(1, min(6, int(0.8 * info.shared_memory) // lot))
        return Tuning(info.multiprocessors, rows, stages, warps=max(4, min(16, width // 1024)))


def route(x_1D: Tensor, weights: FFNWeights, active_1E: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the active experts as bytes, and ``compress x`` or None. A choice that is given stays."""
    router, low_rank, D, R = weights.router, weights.compensation, weights.d_model, weights.rank
    device, block_d = x_1D.device, triton.next_power_of_2(D)
    routed = weights.num_experts if active_1E is None else 0
    if active_1E is None:
        active_1E = torch.empty(1, weights.num_experts, dtype=torch.uint8, device=device)
    active_1E = active_1E.view(torch.uint8)
    z_R = torch.empty(R, dtype=torch.float32, device=device) if R else None
    if routed + R:
        _route[(routed + R,)](
            x_1D,
            router.matrix.rows,
            router.matrix.scales,
            router.bias,
            active_1E,
            low_rank and low_rank.compress.rows,
            low_rank and low_rank.bias,
            z_R,
            routed,
            D,
            router.threshold,
            HAS_BIAS=router.bias is not None,
            COMPENSATED=R > 0,
            BLOCK_D=block_d,
            num_warps=min(8, max(1, block_d // 512)),
            **device_info(device).overlap,
        )
    return active_1E, z_R


def add_parts(
    partial_PD: Tensor, y_1D: Tensor, weights: FFNWeights, active_1E: Tensor, z_R: Tensor | None, columns: int
) -> Tensor:
    """Write the sum of the programs' outputs, the bias and the compensation to ``y_1D``, and return it."""
    (programs, D), E, R = partial_PD.shape, weights.num_experts, weights.rank
    bias, low_rank = weights.down.bias, weights.compensation
    _sum[(triton.cdiv(D, columns),)](
        partial_PD,
        bias,
        y_1D,
        active_1E,
        z_R,
        low_rank and low_rank.expand.rows,
        D,
        E,
        R,
        programs,
        HAS_BIAS=bias is not None,
        COMPENSATED=R > 0,
        BLOCK_P=triton.next_power_of_2(programs),
        BLOCK_D=columns,
        BLOCK_E=triton.next_power_of_2(E),
        BLOCK_R=triton.next_power_of_2(max(R, 1)),
        num_warps=4,
        **device_info(y_1D.device).overlap,
    )
    return y_1D


def token_ffn(x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None, tuning: Tuning | None = None) -> Tensor:
    """``[1, D]`` -> ``[1, D]``."""
    D, E = weights.d_model, weights.num_experts
    up, down, gate, device = weights.up, weights.down, weights.gate, x_TD.device
    tuning = tuning or Tuning.of(device, D, 3 if gate else 2, up.matrix.rows.dtype.itemsize)
    active_TE, z_R = route(x_TD, weights, active_TE)
    order = torch.empty(tuning.programs, E, dtype=torch.int32, device=device)
    partial = torch.empty(tuning.programs, D, dtype=torch.float32, device=device)
    _experts[(tuning.programs,)](
        x_TD,
        gate and gate.matrix.rows,
        up.matrix.rows,
        down.matrix.rows,
        gate and gate.bias,
        up.bias,
        active_TE,
        order,
        partial,
        E,
        D,
        ACT=weights.act,
        GATED=gate is not None,
        HAS_GATE_BIAS=gate is not None and gate.bias is not None,
        HAS_UP_BIAS=up.bias is not None,
        N=weights.expert_size,
        BLOCK_E=triton.next_power_of_2(E),
        BLOCK_D=triton.next_power_of_2(D),
        ROWS=tuning.rows,
        STAGES=tuning.stages,
        num_warps=tuning.warps,
        **device_info(device).overlap,
    )
    return add_parts(partial, torch.empty_like(x_TD), weights, active_TE, z_R, tuning.columns)
