"""2 to 64 tokens, int8 or int4 weights: four launches, almost as in :mod:`lte.ops.triton_union`.

1. The router.
2. ``up``: a program has some neurons of one expert. It ends if no token wants the expert.
3. ``down``: for each slice of the output's columns, ``splits`` programs share the wanted experts.
4. The sum of what these programs wrote.

To make a float of a number of 4 bits takes as long as to read it. So weights are the first operand of matrix units,
which take 16 of their rows for 8 tokens, and no two warps unpack the same weights.
"""
# pyright: basic, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from lte.ops import triton_quantised_kernels as kernels
from lte.ops import triton_router
from lte.ops.triton_device import device_info
from lte.ops.triton_union import add_splits
from lte.ops.weights import INT4_GROUP, FFNWeights


@dataclass(frozen=True)
class Tuning:
    """How the work is divided.

    Attributes:
        rows: neurons of a program of ``up``.
        parts: of the columns, which the warps of ``up`` share.
        width: bytes of a row, of each part, that are taken at a time.
        stages: such tiles that are loaded at the same time.
        slice_width: half the columns of a program of ``down``.
        splits: programs that share the experts of a slice.
        warps: of ``up`` and ``down``.
    """

    rows: int = 32
    parts: int = 4
    width: int = 64
    stages: int = 3
    slice_width: int = 128
    splits: int = 32
    warps: int = 4

    @staticmethod
    @cache
    def of(device: torch.device, tokens: int, bits: int, itemsize: int) -> "Tuning":
        """Return the tuning for a number of tokens. It leaves room for two programs on a multiprocessor."""
        padded, info = max(8, triton.next_power_of_2(tokens)), device_info(device)
        rows, width = 32 if padded <= 32 else 16, 64 if itemsize == 2 else 16
        tile = Tuning.parts * width * 2 * (padded * itemsize + rows * bits // 8)
        return Tuning(
            rows=rows,
            width=width,
            stages=max(1, min(3, int(0.45 * info.shared_memory) // tile)),
            slice_width=128 if padded <= 16 else 64,
            splits=max(4, min(32, info.multiprocessors, 512 // padded)),
        )


def quantised_ffn(x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None, tuning: Tuning | None = None) -> Tensor:
    """``[T, D]`` -> ``[T, D]``, T from 2 to 64. The compensation is left out."""
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
    block_t, half = max(8, triton.next_power_of_2(T)), triton.next_power_of_2(D) // 2
    rows = min(N, tuning.rows, INT4_GROUP)
    common = {
        "T": T,
        "E": E,
        "D": D,
        "BITS": bits,
        "GROUP": INT4_GROUP,
        "N": N,
        "BLOCK_T": block_t,
        "ASSEMBLE": x_TD.is_cuda and dtype != torch.float32,
        "num_warps": tuning.warps,
        **overlap,
    }
    kernels.up[(E * N // rows,)](
        x_TD,
        gate and gate.matrix.rows,
        up.matrix.rows,
        gate and gate.matrix.scales,
        up.matrix.scales,
        gate and gate.bias,
        up.bias,
        wanted,
        hidden,
        **choice.arguments(),
        **common,
        ACT=weights.act,
        GATED=gate is not None,
        HAS_GATE_BIAS=gate is not None and gate.bias is not None,
        HAS_UP_BIAS=up.bias is not None,
        ROWS=rows,
        PARTS=tuning.parts,
        SCALE_X=block_t <= 16,
        BLOCK_J=max(16, min(tuning.width, half // tuning.parts)),
        num_stages=tuning.stages,
    )
    width = min(tuning.slice_width, half)
    slices = triton.cdiv(D // 2, width)
    order = torch.empty(slices * tuning.splits, E, dtype=torch.int32, device=device)
    partial = torch.empty(tuning.splits, T, D, dtype=torch.float32, device=device)
    kernels.down[(slices, tuning.splits)](
        hidden,
        down.matrix.rows,
        down.matrix.scales,
        wanted,
        order,
        partial,
        **common,
        ROWS=max(16, min(N, INT4_GROUP)),  # as few as a product can have
        BLOCK_E=triton.next_power_of_2(E),
        BLOCK_J=width,
    )
    return add_splits(partial, down.bias, torch.empty_like(x_TD))
