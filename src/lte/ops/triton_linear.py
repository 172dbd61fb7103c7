"""Linear layers that skip small inputs, in Triton, for 1 to 8 tokens. Weights are stored by input.

A program has some columns of the output and a part of the inputs. It compares these inputs with the cut, and loads the
rows of the others: a load that is masked for a whole row costs no traffic. Up to three matrices with the same input
share a launch: q, k and v, or gate and up. Parts are added in a fixed order, so all runs give the same bits.

1 token is multiplied in fp32, in registers. More tokens use matrix units, and skip the inputs that are small for all.
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

_FEWEST_TOKENS = 16  # rows of a tile of matrix units


@triton.jit
def _share(d_in, BLOCK_I: tl.constexpr, PARTS: tl.constexpr):
    """The inputs of this program's part, from the first to before the last."""
    share = tl.cdiv(tl.cdiv(d_in, PARTS), BLOCK_I) * BLOCK_I
    first = tl.program_id(1) * share
    return first, tl.minimum(first + share, d_in)


@triton.jit
def _rows(matrix, keep_I, i_I, cols_O, d_out):
    """The rows of inputs that are kept. Others are 0 and not read."""
    at_IO = i_I.to(tl.int64)[:, None] * d_out + cols_O[None, :]
    return tl.load(matrix + at_IO, mask=keep_I[:, None] & (cols_O < d_out)[None, :], other=0.0)


@triton.jit(do_not_specialize=["tiles_a", "tiles_b"])
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
    T: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    LOTS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
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
    first, last = _share(d_in, BLOCK_I, PARTS)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    y += tl.program_id(1) * T * all_out + before
    if BLOCK_T == 1:
        sum_IO = tl.zeros([BLOCK_I // LOTS, BLOCK_O], tl.float32)
        for start in range(first, last, BLOCK_I):
            i_I = start + tl.arange(0, BLOCK_I)
            x_I = tl.load(x + i_I, mask=i_I < last, other=0.0).to(tl.float32)
            x_I = tl.where(tl.abs(x_I) <= least, 0.0, x_I)
            w_IO = _rows(matrix, x_I != 0.0, i_I, cols_O, d_out)  # one load of many rows: all are on their way at once
            wx_IO = w_IO.to(tl.float32) * x_I[:, None]
            sum_IO += tl.sum(tl.reshape(wx_IO, [LOTS, BLOCK_I // LOTS, BLOCK_O]), axis=0)
        tl.store(y + cols_O, tl.sum(sum_IO, axis=0), mask=cols_O < d_out)
    else:
        t_T = tl.arange(0, BLOCK_T)
        sum_TO = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
        for start in tl.range(first, last, BLOCK_I, num_stages=STAGES):
            i_I = start + tl.arange(0, BLOCK_I)
            inside_TI = (t_T < T)[:, None] & (i_I < last)[None, :]
            x_TI = tl.load(x + t_T[:, None] * d_in + i_I[None, :], mask=inside_TI, other=0.0)
            x_TI = tl.where(tl.abs(x_TI).to(tl.float32) <= least, 0.0, x_TI)
            keep_I = tl.max((x_TI != 0.0).to(tl.int32), axis=0) > 0
            w_IO = _rows(matrix, keep_I, i_I, cols_O, d_out)
            sum_TO = tl.dot(x_TI.to(w_IO.dtype), w_IO, sum_TO, input_precision="ieee")
        tl.store(
            y + t_T[:, None] * all_out + cols_O[None, :], sum_TO, mask=(t_T < T)[:, None] & (cols_O < d_out)[None, :]
        )


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
        inputs, outputs: the size of a program's tile.
        lots: for one token, the sums of a thread that are added in registers.
        parts: programs that share the inputs.
        stages: for several tokens, tiles that are loaded at the same time.
        warps: of a program.
    """

    inputs: int
    outputs: int
    lots: int
    parts: int
    stages: int
    warps: int

    @staticmethod
    @cache
    def of(device: torch.device, tokens: int, d_in: int, d_out: int) -> "Tuning":
        """Return the best measured tuning of an H200, with enough parts to keep this device busy."""
        outputs = 32 if tokens == 1 else 64
        programs = triton.cdiv(d_out, outputs)
        wanted = device_info(device).multiprocessors * (1 if tokens == 1 else 2)
        parts = 1
        while programs * parts < 0.9 * wanted and parts < 16 and d_in // parts > 256:
            parts *= 2
        if tokens == 1:
            return Tuning(1024, outputs, 16, parts, 1, 8)
        return Tuning(128, outputs, 1, parts, 6, 4)


def products(
    x_TI: Tensor, rows: Sequence[Tensor], cuts: Sequence[Tensor | None], tuning: Tuning | None = None
) -> Tensor:
    """Return the products of ``[T, I]`` with each ``[I, O]``, side by side."""
    (tokens, d_in), outs = x_TI.shape, [one.shape[1] for one in rows]
    tuning = tuning or Tuning.of(x_TI.device, tokens, d_in, sum(outs))
    overlap = device_info(x_TI.device).overlap
    y_TO = x_TI.new_empty(tokens, sum(outs))
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
            T=tokens,
            COUNT=len(rows),
            BLOCK_T=1 if tokens == 1 else _FEWEST_TOKENS,
            BLOCK_I=tuning.inputs,
            BLOCK_O=tuning.outputs,
            LOTS=tuning.lots,
            PARTS=tuning.parts,
            STAGES=tuning.stages,
            num_warps=tuning.warps,
            **overlap,
        )
        if tuning.parts > 1:
            size = y_TO.numel()
            _sum[(triton.cdiv(size, 256),)](parts, y_TO, size, PARTS=tuning.parts, BLOCK=256, num_warps=4, **overlap)
    return y_TO
