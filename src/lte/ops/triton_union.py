"""2 to 64 tokens: the experts that any of them wants are read once, and each token's own choice is masked in.

1. The router's logits, in parts (:mod:`lte.ops.triton_router`).
2. ``_up``: a program has neurons of its own. It adds up their experts' logits, and leaves where no token wants them.
3. ``_down``: the sum of the wanted experts into the output. They are shared out among ``splits`` programs for each
   slice of the output's columns; each leaves a partial sum.
4. ``_sum``: adds the partial sums in a fixed order, and what stands in for idle experts: step 1 multiplies by the rows
   of ``compress`` too, and step 2 leaves what each token chose.

How many experts are wanted is known on the device only, and the grids are for all of them.
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
MAX_RANK = 256  # more of the compensation does not fit the registers of `_sum`


@triton.jit
def _up(
    x,
    gate,
    up,
    gate_bias,
    up_bias,
    wanted,
    active,
    hidden,
    logits,
    router_bias,
    T,
    E,
    D,
    stride_s,
    stride_t,
    stride_e,
    threshold,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_ROUTER_BIAS: tl.constexpr,
    KEEPS_ACTIVE: tl.constexpr,
    N: tl.constexpr,
    EXPERTS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # EXPERTS whole experts, or a SHARE of the neurons of a single one
    BLOCK_N: tl.constexpr = EXPERTS * SHARE
    neurons_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens_T = tl.arange(0, BLOCK_T)
    experts_E = tl.program_id(0) * BLOCK_N // N + tl.arange(0, EXPERTS)
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
    if KEEPS_ACTIVE:
        inside_TE = (tokens_T < T)[:, None] & (experts_E < E)[None, :]
        tl.store(active + tokens_T[:, None] * E + experts_E[None, :], on_TE.to(tl.uint8), mask=inside_TE)
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
    T,
    E,
    D,
    N: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
        for i in tl.static_range(EXPERTS):  # one by one: a vector of them would be copied for each row
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
    at_TD = split * T * D + tokens_T[:, None] * D + cols_D[None, :]
    tl.store(partial + at_TD, sum_TD, mask=(tokens_T < T)[:, None] & (cols_D < D)[None, :])


@triton.jit
def _sum(
    partial,
    bias,
    y,
    active,
    z,
    compress_bias,
    expand,
    T,
    E,
    D,
    R,
    stride_s,
    stride_t,
    stride_r,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COMPENSATED: tl.constexpr,
    Z_SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    tokens_T = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    if COMPENSATED:
        ranks_R = tl.arange(0, BLOCK_R)
        inside_DR = (cols_D < D)[:, None] & (ranks_R < R)[None, :]
        expand_DR = tl.load(expand + cols_D[:, None] * R + ranks_R[None, :], mask=inside_DR, other=0.0)
        bias_R = tl.load(compress_bias + ranks_R, mask=ranks_R < R, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    at_TD = tokens_T[:, None] * D + cols_D[None, :]
    inside_TD = (tokens_T < T)[:, None] & (cols_D < D)[None, :]
    sum_TD = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        sum_TD += tl.load(partial + split * T * D + at_TD, mask=inside_TD, other=0.0)
    if HAS_BIAS:
        sum_TD += tl.load(bias + cols_D, mask=cols_D < D, other=0.0).to(tl.float32)[None, :]
    if COMPENSATED:
        experts_E = tl.arange(0, BLOCK_E)
        inside_TE = (tokens_T < T)[:, None] & (experts_E < E)[None, :]
        on_TE = tl.load(active + tokens_T[:, None] * E + experts_E[None, :], mask=inside_TE, other=0).to(tl.int32)
        idle_T = 1 - tl.sum(on_TE, axis=1) / E
        at_TR = tokens_T[:, None] * stride_t + ranks_R[None, :] * stride_r
        inside_TR = (tokens_T < T)[:, None] & (ranks_R < R)[None, :]
        z_TR = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32) + bias_R[None, :]
        for split in tl.static_range(Z_SPLITS):
            z_TR += tl.load(z + split * stride_s + at_TR, mask=inside_TR, other=0.0)
        expand_RD = expand_DR.to(tl.float32).T
        sum_TD = tl.dot(z_TR * idle_T[:, None], expand_RD, sum_TD, input_precision="ieee")
    tl.store(y + at_TD, sum_TD, mask=inside_TD)


@dataclass(frozen=True)
class Tuning:
    """How the work is cut; measured on an H100.

    Attributes:
        up_neurons: of a program of ``_up``: some experts, or a part of one.
        up_width, up_stages: columns of the weights that it takes at a time, and how many such tiles are on their way.
        slice_width: columns of the output that a program of ``_down`` makes.
        down_experts, down_stages: experts that it takes at a time; tiles on their way.
        splits: programs that share the experts of a slice.
        up_warps, down_warps: of a program.
        router: how the router's kernel is cut; None: as fits.
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
    def of(device: torch.device, tokens: int, d_model: int, expert_size: int, itemsize: int) -> "Tuning":
        """For a shape and a device."""
        info = device_info(device)
        padded = max(16, triton.next_power_of_2(tokens))
        slice_width, slices = 128, triton.cdiv(d_model, 128)
        up_neurons, up_width, up_stages = (32, 128, 4) if padded == 16 else (64, 64, 4) if padded == 32 else (32, 64, 3)
        up_width = min(up_width, triton.next_power_of_2(d_model))
        # with many tokens one program of _down to a multiprocessor, with large tiles, where they fit; else two
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
            splits=max(1, min(16, share * info.multiprocessors // slices)),
        )


def union_ffn(x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None, tuning: Tuning | None = None) -> Tensor:
    """``[T, D]`` -> ``[T, D]``, T up to :data:`MAX_TOKENS`."""
    (T, D), E, N, R = x_TD.shape, weights.num_experts, weights.expert_size, weights.rank
    device = x_TD.device
    tuning = tuning or Tuning.of(device, T, D, N, x_TD.dtype.itemsize)
    overlap = device_info(device).overlap
    block_t = max(16, triton.next_power_of_2(T))
    keeps_active = R > 0 and active_TE is None
    if active_TE is None:
        choice = triton_router.in_parts(x_TD, weights, tuning.router, by_expert=True, compress_RD=weights.compress)
        active_TE = torch.empty(T, E, dtype=torch.uint8, device=device) if R else None
    else:
        active_TE = active_TE.view(torch.uint8)
        choice = triton_router.given(active_TE, x_TD, weights.compress)
    wanted = torch.empty(E, dtype=torch.int32, device=device)
    hidden = torch.empty(T, E * N, dtype=x_TD.dtype, device=device)
    _up[(triton.cdiv(E * N, tuning.up_neurons),)](
        x_TD,
        weights.gate,
        weights.up,
        weights.gate_bias,
        weights.up_bias,
        wanted,
        active_TE,
        hidden,
        T=T,
        E=E,
        D=D,
        **choice.arguments(),
        ACT=weights.act,
        GATED=weights.gate is not None,
        HAS_GATE_BIAS=weights.gate_bias is not None,
        HAS_UP_BIAS=weights.up_bias is not None,
        KEEPS_ACTIVE=keeps_active,
        N=N,
        EXPERTS=max(1, tuning.up_neurons // N),
        SHARE=min(N, tuning.up_neurons),
        BLOCK_T=block_t,
        BLOCK_D=tuning.up_width,
        num_warps=tuning.up_warps,
        num_stages=tuning.up_stages,
        **overlap,
    )
    slices = triton.cdiv(D, tuning.slice_width)
    order = torch.empty(slices * tuning.splits, E, dtype=torch.int32, device=device)
    partial = torch.empty(tuning.splits, T, D, dtype=torch.float32, device=device)
    _down[(slices, tuning.splits)](
        hidden,
        weights.down,
        wanted,
        order,
        partial,
        T,
        E,
        D,
        N=N,
        EXPERTS=tuning.down_experts,
        BLOCK_T=block_t,
        BLOCK_E=triton.next_power_of_2(E),
        BLOCK_D=tuning.slice_width,
        num_warps=tuning.down_warps,
        num_stages=2 * tuning.down_stages - 1,  # Triton spends every other stage on the experts' numbers
        **overlap,
    )
    y_TD = torch.empty_like(x_TD)
    rows, columns, warps = (16, 32, 4) if R else (1, 256, 2)  # as many tokens as a product needs
    _sum[(triton.cdiv(D, columns), triton.cdiv(T, rows))](
        partial,
        weights.down_bias,
        y_TD,
        active_TE,
        choice.z,
        weights.compress_bias,
        weights.expand,
        T,
        E,
        D,
        R,
        *((0, 0, 0) if choice.z is None else choice.z.stride()),
        SPLITS=tuning.splits,
        HAS_BIAS=weights.down_bias is not None,
        COMPENSATED=R > 0,
        Z_SPLITS=0 if choice.z is None else len(choice.z),
        BLOCK_T=rows,
        BLOCK_E=triton.next_power_of_2(E),
        BLOCK_D=columns,
        BLOCK_R=max(16, triton.next_power_of_2(R)),
        num_warps=warps,
        **overlap,
    )
    return y_TD
