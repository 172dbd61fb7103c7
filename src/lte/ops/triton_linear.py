"""Linear layers that skip small inputs, in Triton, for one token. Weights are stored by input.

A program has some columns of the output and a part of the inputs. It compares these inputs with the cut, and loads the
rows of the others: a load that is masked for a whole row costs no traffic. Up to three matrices with the same input
share a launch: q, k and v, or gate and up. Parts are added in a fixed order, so all runs give the same bits.
"""
# pyright: basic, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.ops.sparse_linear import MOST
from lte.ops.triton_device import device_info

_REGISTERS = 64
"""Of a thread. Without this number the compiler saves registers: it moves each load to where its value is used."""


@triton.jit
def _inputs(x, i_I, last, least):
    """Inputs in fp32, and 0 for those that are not larger than ``least``."""
    x_I = tl.load(x + i_I, mask=i_I < last, other=0.0).to(tl.float32)
    return tl.where(tl.abs(x_I) <= least, 0.0, x_I)


@triton.jit
def _rows(matrix, x_I, i_I, cols_O, d_out):
    """The rows of inputs that are not 0. Others are not read."""
    at_IO = i_I.to(tl.int64)[:, None] * d_out + cols_O[None, :]
    return tl.load(matrix + at_IO, mask=(x_I != 0.0)[:, None] & (cols_O < d_out)[None, :], other=0.0)


@triton.jit(do_not_specialize=["tiles_a", "tiles_b", "parts"])
def _products(
    x,
    a,
    b,
    c,
    cut_a,
    cut_b,
    cut_c,
    y,
    d_in,
    out_a,
    out_b,
    out_c,
    all_out,
    tiles_a,
    tiles_b,
    parts,
    COUNT: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    LOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    tile = tl.program_id(0)
    matrix, cut, d_out, before = a, cut_a, out_a, 0
    if COUNT > 1:
        of_b, of_c = tile >= tiles_a, tile >= tiles_a + tiles_b
        if of_b:
            matrix, cut, d_out, before = b, cut_b, out_b, out_a
            tile -= tiles_a
        if of_c:
            matrix, cut, d_out, before = c, cut_c, out_c, out_a + out_b
            tile -= tiles_b
    cols_O = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    least = tl.load(cut).to(tl.float32)
    share = tl.cdiv(tl.cdiv(d_in, parts), BLOCK_I) * BLOCK_I
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, d_in)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sum_IO = tl.zeros([BLOCK_I, BLOCK_O], tl.float32)
    for start in range(first, last, LOTS * BLOCK_I):
        i_I = start + tl.arange(0, BLOCK_I)
        x_LI = ()
        for lot in tl.static_range(LOTS):
            x_LI += (_inputs(x, i_I + lot * BLOCK_I, last, least),)
        rows_LIO = ()  # of all lots before the first is used, so that all loads are on their way together
        for lot in tl.static_range(LOTS):
            rows_LIO += (_rows(matrix, x_LI[lot], i_I + lot * BLOCK_I, cols_O, d_out),)
        for lot in tl.static_range(LOTS):
            sum_IO += x_LI[lot][:, None] * rows_LIO[lot].to(tl.float32)
    y += tl.program_id(1) * all_out + before
    tl.store(y + cols_O, tl.sum(sum_IO, axis=0), mask=cols_O < d_out)


@triton.jit
def _sum(parts, y, size, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    parts_P = tl.load(parts + tl.arange(0, PARTS)[:, None] * size + at[None, :], mask=(at < size)[None, :], other=0.0)
    tl.store(y + at, tl.sum(parts_P, axis=0), mask=at < size)


@dataclass(frozen=True)
class Tuning:
    """How the work is divided.

    Attributes:
        outputs: of a program.
        warps: of a program. A thread loads 16 bytes of each lot, so they decide the inputs of a lot.
        parts: programs that share the inputs of an output.
        lots: loads of a thread that are on their way together.
    """

    outputs: int
    warps: int
    parts: int
    lots: int = 8

    @property
    def inputs(self) -> int:
        """Inputs of a lot, for weights of 16 bits."""
        return max(1, 256 * self.warps // self.outputs)

    @staticmethod
    @cache
    def of(device: torch.device, d_in: int, d_out: int) -> "Tuning":
        """Return the best measured tuning of an H200. Few programs are large, and more are smaller."""
        multiprocessors = device_info(device).multiprocessors
        if triton.cdiv(d_out, 32) > multiprocessors:
            return Tuning(outputs=64, warps=4, parts=4 if d_in >= 2048 else 1)
        warps, parts = 32 if d_in >= 2048 else 8, 1
        while triton.cdiv(d_out, 32) * parts < 0.9 * multiprocessors and d_in > 128 * parts:
            parts *= 2
        return Tuning(outputs=32, warps=warps, parts=parts)


def products(
    x_TI: Tensor, rows: Sequence[Tensor], cuts: Sequence[Tensor | None], tuning: Tuning | None = None
) -> Tensor:
    """Return the products of ``[1, I]`` with each ``[I, O]``, side by side."""
    d_in, outs = x_TI.shape[1], [one.shape[1] for one in rows]
    tuning = tuning or Tuning.of(x_TI.device, d_in, sum(outs))
    overlap = device_info(x_TI.device).overlap
    y_TO = x_TI.new_empty(1, sum(outs))
    parts = y_TO if tuning.parts == 1 else y_TO.new_empty(tuning.parts, *y_TO.shape, dtype=torch.float32)
    cuts = [x_TI.new_zeros(()) if one is None else one for one in cuts]
    unused = MOST - len(rows)
    tiles = [triton.cdiv(one, tuning.outputs) for one in outs]
    with torch.cuda.device_of(x_TI):  # Triton launches on the current device, which may be another one
        _products[(sum(tiles), tuning.parts)](
            x_TI,
            *rows,
            *rows[:1] * unused,
            *cuts,
            *cuts[:1] * unused,
            parts,
            d_in,
            *outs,
            *[0] * unused,
            sum(outs),
            *(*tiles, 0)[:2],
            tuning.parts,
            COUNT=len(rows),
            BLOCK_I=tuning.inputs,
            BLOCK_O=tuning.outputs,
            LOTS=tuning.lots,
            num_warps=tuning.warps,
            maxnreg=_REGISTERS,
            **overlap,
        )
        if tuning.parts > 1:
            size = y_TO.numel()
            _sum[(triton.cdiv(size, 256),)](parts, y_TO, size, PARTS=tuning.parts, BLOCK=256, num_warps=4, **overlap)
    return y_TO
