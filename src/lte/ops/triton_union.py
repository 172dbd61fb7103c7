"""2 to 64 tokens: experts that any token wants are read once, and each token's own choice is a mask.

1. The router's logits, in parts (:mod:`lte.ops.triton_router`).
2. ``_up``: a program has its own neurons. It sums the logits of their experts and ends if no token wants them.
3. ``_down``: the wanted experts are summed into the output. For each slice of the output's columns, ``splits`` programs
   share these experts. Each writes a partial sum.
4. ``_sum``: adds the partial sums in a fixed order.

Compensation is a part of these steps. Step 1 also computes ``compress x``. The first programs of step 2, one for each
token, scale the result by the share of idle experts. In step 3 each program multiplies some columns of ``expand``.

Only the device knows how many experts are wanted, so the grids are large enough for all experts.
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
from lte.ops.weights import FFNWeights

MAX_TOKENS = 64
_RANKS = 64  # most rows of the compensation in a program of `_down`: a larger tile may not fit


@triton.jit
def _stand_in(
    logits,
    router_bias,
    z,
    compress_bias,
    stand_in,
    token,
    T,
    E,
    R,
    stride_s,
    stride_t,
    stride_e,
    z_stride_s,
    z_stride_t,
    z_stride_r,
    threshold,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_ROUTER_BIAS: tl.constexpr,
    Z_SPLITS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``(1 - share of experts at work) * (compress x + bias)`` of a token."""
    on_1E = chosen(
        logits,
        router_bias,
        stride_s,
        stride_t,
        stride_e,
        threshold,
        token + tl.zeros([1], dtype=tl.int32),
        tl.arange(0, BLOCK_E),
        T,
        E,
        SPLITS,
        BLOCK_S,
        HAS_ROUTER_BIAS,
    )
    idle = 1 - tl.sum(tl.sum(on_1E.to(tl.int32), axis=1), axis=0) / E
    ranks_R = tl.arange(0, BLOCK_R)
    z_R = tl.load(compress_bias + ranks_R, mask=ranks_R < R, other=0.0).to(tl.float32)
    for split in tl.static_range(Z_SPLITS):
        at_R = split * z_stride_s + token * z_stride_t + ranks_R * z_stride_r
        z_R += tl.load(z + at_R, mask=ranks_R < R, other=0.0)
    tl.store(stand_in + token * R + ranks_R, (idle * z_R).to(stand_in.dtype.element_ty), mask=ranks_R < R)


@triton.jit
def _up(
    x,
    gate,
    up,
    gate_bias,
    up_bias,
    wanted,
    hidden,
    logits,
    router_bias,
    z,
    compress_bias,
    stand_in,
    T,
    E,
    D,
    R,
    stride_s,
    stride_t,
    stride_e,
    z_stride_s,
    z_stride_t,
    z_stride_r,
    threshold,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_ROUTER_BIAS: tl.constexpr,
    Z_SPLITS: tl.constexpr,
    N: tl.constexpr,
    EXPERTS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # EXPERTS whole experts, or a SHARE of the neurons of a single one
    BLOCK_N: tl.constexpr = EXPERTS * SHARE
    program = tl.program_id(0)
    if Z_SPLITS:  # each of the first programs has a token instead: it ends while the others wait for memory
        program -= T
        if program < 0:
            _stand_in(
                logits,
                router_bias,
                z,
                compress_bias,
                stand_in,
                program + T,
                T,
                E,
                R,
                stride_s,
                stride_t,
                stride_e,
                z_stride_s,
                z_stride_t,
                z_stride_r,
                threshold,
                SPLITS,
                BLOCK_S,
                HAS_ROUTER_BIAS,
                Z_SPLITS,
                BLOCK_E,
                BLOCK_R,
            )
            program = tl.cdiv(E * N, BLOCK_N)  # beyond the neurons there is nothing to do
    neurons_N = program * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens_T = tl.arange(0, BLOCK_T)
    experts_E = program * BLOCK_N // N + tl.arange(0, EXPERTS)
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
    ).to(tl.int32)
    on_E = tl.max(on_TE, axis=0)
    tl.store(wanted + experts_E, on_E, mask=experts_E < E)
    if tl.max(on_E, axis=0) != 0:
        on_N = tl.reshape(tl.broadcast_to(on_E[:, None], [EXPERTS, SHARE]), [BLOCK_N]) != 0
        on_TN = tl.reshape(tl.broadcast_to(on_TE[:, :, None], [BLOCK_T, EXPERTS, SHARE]), [BLOCK_T, BLOCK_N]) != 0
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
            inside_ND = on_N[:, None] & (cols_D < D)[None, :]
            u_ND = tl.load(up + at_ND, mask=inside_ND, other=0.0)
            up_TN = tl.dot(x_TD, u_ND.T, up_TN, input_precision="ieee")
            if GATED:
                g_ND = tl.load(gate + at_ND, mask=inside_ND, other=0.0)
                gate_TN = tl.dot(x_TD, g_ND.T, gate_TN, input_precision="ieee")
        if HAS_UP_BIAS:
            up_TN += tl.load(up_bias + neurons_N, mask=on_N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            if HAS_GATE_BIAS:
                gate_TN += tl.load(gate_bias + neurons_N, mask=on_N, other=0.0).to(tl.float32)[None, :]
            h_TN = activate(gate_TN, ACT) * up_TN
        else:
            h_TN = activate(up_TN, ACT)
        h_TN = tl.where(on_TN, h_TN, 0.0)
        at_TN = tokens_T[:, None] * (E * N) + neurons_N[None, :]
        tl.store(
            hidden + at_TN,
            h_TN.to(hidden.dtype.element_ty),
            mask=(tokens_T < T)[:, None] & (neurons_N < E * N)[None, :],
        )


@triton.jit
def _down(
    hidden,
    down,
    wanted,
    order,
    partial,
    stand_in,
    expand,
    T,
    E,
    D,
    R,
    COMPENSATED: tl.constexpr,
    N: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    split, splits = tl.program_id(1), tl.num_programs(1)
    order += (tl.program_id(0) * splits + split) * E
    count = list_wanted(wanted, order, E, BLOCK_E)
    last = ((split + 1) * count) // splits
    tokens_T = tl.arange(0, BLOCK_T)
    cols_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows_R = tl.arange(0, EXPERTS * N)
    sum_TD = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for slot in tl.range((split * count) // splits, last, EXPERTS):
        experts_R = tl.zeros([EXPERTS * N], dtype=tl.int32)
        for i in tl.static_range(EXPERTS):  # one by one: a vector would be copied for each row
            expert = tl.load(order + slot + i, mask=slot + i < last, other=0)
            experts_R = tl.where(rows_R // N == i, expert, experts_R)
        here_R = slot + rows_R // N < last
        neurons_R = tl.max_contiguous(tl.multiple_of(experts_R * N + rows_R % N, N), N)
        h_TR = tl.load(
            hidden + tokens_T[:, None] * (E * N) + neurons_R[None, :],
            mask=(tokens_T < T)[:, None] & here_R[None, :],
            other=0.0,
        )
        d_RD = tl.load(
            down + neurons_R.to(tl.int64)[:, None] * D + cols_D[None, :],
            mask=here_R[:, None] & (cols_D < D)[None, :],
            other=0.0,
        )
        sum_TD = tl.dot(h_TR, d_RD, sum_TD, input_precision="ieee")
    if COMPENSATED:
        ranks_R = split * BLOCK_R + tl.arange(0, BLOCK_R)
        if split * BLOCK_R < R:
            s_TR = tl.load(
                stand_in + tokens_T[:, None] * R + ranks_R[None, :],
                mask=(tokens_T < T)[:, None] & (ranks_R < R)[None, :],
                other=0.0,
            )
            e_DR = tl.load(
                expand + cols_D[:, None] * R + ranks_R[None, :],
                mask=(cols_D < D)[:, None] & (ranks_R < R)[None, :],
                other=0.0,
            )
            sum_TD = tl.dot(s_TR, e_DR.to(s_TR.dtype).T, sum_TD, input_precision="ieee")
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
    """How the work is divided, as measured on an H100.

    Attributes:
        up_neurons: neurons of a program of ``_up``: some experts, or a part of one.
        up_width, up_stages: columns of the weights that it takes at a time, and the number of such tiles that are
            loaded at the same time.
        slice_width: columns of the output that a program of ``_down`` makes.
        down_experts, down_stages: experts that it takes at a time, and tiles that are loaded at the same time.
        splits: programs that share the experts of a slice, and the rows of compensation.
        up_warps, down_warps: of a program.
        router: how the work of the router's kernel is divided; None takes what fits.
    """

    up_neurons: int = 32
    up_width: int = 128
    up_stages: int = 4
    slice_width: int = 128
    down_experts: int = 2
    down_stages: int = 4
    splits: int = 8
    up_warps: int = 4
    down_warps: int = 4
    router: triton_router.Tuning | None = None

    @staticmethod
    @cache
    def of(device: torch.device, tokens: int, d_model: int, expert_size: int, itemsize: int, rank: int = 0) -> "Tuning":
        """Return the tuning for a shape and a device."""
        info = device_info(device)
        padded = max(16, triton.next_power_of_2(tokens))
        slice_width, slices = 128, triton.cdiv(d_model, 128)
        up_neurons, up_width, up_stages = (32, 128, 4) if padded == 16 else (64, 64, 4) if padded == 32 else (32, 64, 3)
        up_width = min(up_width, triton.next_power_of_2(d_model))
        # many tokens: one program of _down on a multiprocessor, with large tiles, if they fit; else two
        down_neurons, share = (128, 1) if padded > 16 and info.shared_memory > 160_000 else (64, 2)
        up_tile = (2 * up_neurons + padded) * up_width * itemsize
        down_experts = max(1, down_neurons // expert_size)
        down_tile = down_experts * expert_size * (slice_width + padded) * itemsize
        return Tuning(
            up_neurons=up_neurons,
            up_width=up_width,
            up_stages=max(1, min(up_stages, int(0.45 * info.shared_memory) // up_tile)),
            slice_width=slice_width,
            down_experts=down_experts,
            down_stages=max(1, min(6, int(0.9 * info.shared_memory) // share // down_tile)),
            splits=max(1, triton.cdiv(rank, _RANKS), min(16, share * info.multiprocessors // slices)),
        )


def add_splits(partial_STD: Tensor, bias_D: Tensor | None, y_TD: Tensor) -> Tensor:
    """Write the sum of the splits' outputs and the bias to ``y_TD``, and return it."""
    block, size, D = 256, y_TD.numel(), y_TD.shape[-1]
    _sum[(triton.cdiv(size, block),)](
        partial_STD,
        bias_D,
        y_TD,
        D,
        size,
        SPLITS=partial_STD.shape[0],
        HAS_BIAS=bias_D is not None,
        BLOCK=block,
        num_warps=2,
        **device_info(y_TD.device).overlap,
    )
    return y_TD


def union_ffn(x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None, tuning: Tuning | None = None) -> Tensor:
    """``[T, D]`` -> ``[T, D]``, T up to :data:`MAX_TOKENS`."""
    (T, D), E, N, R = x_TD.shape, weights.num_experts, weights.expert_size, weights.rank
    up, down, gate, low_rank = weights.up, weights.down, weights.gate, weights.compensation
    device, compress_RD = x_TD.device, low_rank and low_rank.compress.rows
    tuning = tuning or Tuning.of(device, T, D, N, x_TD.dtype.itemsize, R)
    overlap = device_info(device).overlap
    block_t = max(16, triton.next_power_of_2(T))
    if active_TE is None:
        choice = triton_router.in_parts(x_TD, weights.router, tuning.router, by_expert=True, compress_RD=compress_RD)
    else:
        choice = triton_router.given(active_TE, x_TD, compress_RD)
    wanted = torch.empty(E, dtype=torch.int32, device=device)
    hidden = torch.empty(T, E * N, dtype=x_TD.dtype, device=device)
    stand_in = torch.empty(T, R, dtype=x_TD.dtype, device=device) if R else None
    block_e = triton.next_power_of_2(E)
    _up[(triton.cdiv(E * N, tuning.up_neurons) + (T if R else 0),)](
        x_TD,
        gate and gate.matrix.rows,
        up.matrix.rows,
        gate and gate.bias,
        up.bias,
        wanted,
        hidden,
        compress_bias=low_rank and low_rank.bias,
        stand_in=stand_in,
        T=T,
        E=E,
        D=D,
        R=R,
        **choice.arguments(),
        **choice.arguments_of_z(),
        ACT=weights.act,
        GATED=gate is not None,
        HAS_GATE_BIAS=gate is not None and gate.bias is not None,
        HAS_UP_BIAS=up.bias is not None,
        N=N,
        EXPERTS=max(1, tuning.up_neurons // N),
        SHARE=min(N, tuning.up_neurons),
        BLOCK_T=block_t,
        BLOCK_D=tuning.up_width,
        BLOCK_E=block_e,
        BLOCK_R=triton.next_power_of_2(max(R, 1)),
        num_warps=tuning.up_warps,
        num_stages=tuning.up_stages,
        **overlap,
    )
    slices = triton.cdiv(D, tuning.slice_width)
    order = torch.empty(slices * tuning.splits, E, dtype=torch.int32, device=device)
    partial = torch.empty(tuning.splits, T, D, dtype=torch.float32, device=device)
    _down[(slices, tuning.splits)](
        hidden,
        down.matrix.rows,
        wanted,
        order,
        partial,
        stand_in,
        low_rank and low_rank.expand.rows,
        T,
        E,
        D,
        R,
        COMPENSATED=R > 0,
        N=N,
        EXPERTS=tuning.down_experts,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_D=tuning.slice_width,
        BLOCK_R=max(16, triton.next_power_of_2(triton.cdiv(R, tuning.splits))),  # as narrow as a product can be
        num_warps=tuning.down_warps,
        num_stages=2 * tuning.down_stages - 1,  # Triton spends every other stage on the experts' numbers
        **overlap,
    )
    return add_splits(partial, down.bias, torch.empty_like(x_TD))
