"""The kernels of :mod:`lte.ops.triton_quantised`, and how they make floats of int8 and int4.

A tile of int4 is loaded as bytes. Each byte holds one number of the first half of a row and one of the second half, so
a tile has the columns J and J + D / 2. The scales of int4 belong to a column of a group of rows. They multiply x, or
weights where these are fewer numbers. The scales of int8 belong to outputs, so they multiply sums.
"""
# pyright: basic, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false

import triton
import triton.language as tl

from lte.ops.triton_activations import activate
from lte.ops.triton_router import chosen, list_wanted


def _assembly(pair: str, exponent: str, one: str, zero: str) -> tl.constexpr:
    """Four bytes become halves of pairs, whose other bytes are an exponent: 128 (bf16) or 1024 (fp16) is added."""
    code = f".reg .b32 low, high, one, zero; mov.b32 one, {one}; mov.b32 zero, {zero};"
    code += "and.b32 low, $4, 0x0F0F0F0F; shr.u32 high, $4, 4; and.b32 high, high, 0x0F0F0F0F;"
    for pairs, half in ((0, "low"), (2, "high")):
        code += f"prmt.b32 ${pairs}, {half}, {exponent}, 0x5140; prmt.b32 ${pairs + 1}, {half}, {exponent}, 0x5342;"
    for output in range(4):
        code += f"fma.rn.{pair} ${output}, ${output}, one, zero;"
    return tl.constexpr("{" + code + "}")


_BF16 = _assembly("bf16x2", "0x43434343", "0x3F803F80", "0xC308C308")
_FP16 = _assembly("f16x2", "0x64646464", "0x3C003C00", "0xE408E408")


@triton.jit
def nibbles(bytes, dtype: tl.constexpr, ASSEMBLE: tl.constexpr):
    """Return the numbers of the low and of the high halves of bytes. ``ASSEMBLE``: on a GPU, in half precision."""
    if ASSEMBLE:
        return tl.inline_asm_elementwise(
            _BF16 if dtype == tl.bfloat16 else _FP16,
            "=&r,=&r,=&r,=&r,r",
            [bytes],
            dtype=(tl.bfloat16, tl.bfloat16) if dtype == tl.bfloat16 else (tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        return ((bytes & 15).to(tl.int32) - 8).to(dtype), ((bytes >> 4).to(tl.int32) - 8).to(dtype)


@triton.jit
def _load_two(
    rows, rows_R, cols_J, inside_RJ, D: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLE: tl.constexpr
):
    """Return numbers without scales, at columns J and at J + D / 2. ``rows_R``, ``cols_J`` are broadcast."""
    if BITS == 4:
        return nibbles(tl.load(rows + rows_R * (D // 2) + cols_J, mask=inside_RJ, other=0), DTYPE, ASSEMBLE)
    else:
        at_RJ = rows + rows_R * D + cols_J
        low_RJ = tl.load(at_RJ, mask=inside_RJ, other=0).to(DTYPE)
        return low_RJ, tl.load(at_RJ + D // 2, mask=inside_RJ, other=0).to(DTYPE)


@triton.jit
def _multiply(
    sum_PRT,
    rows,
    scales,
    x_PTJ,
    z_PTJ,
    rows_R,
    cols_PJ,
    D: tl.constexpr,
    BITS: tl.constexpr,
    SCALE_X: tl.constexpr,
    ASSEMBLE: tl.constexpr,
):
    """Add the products of rows with x (columns J) and z (columns J + D / 2), for each part P of the columns apart."""
    DTYPE: tl.constexpr = x_PTJ.dtype
    inside_PJ = cols_PJ < D // 2
    low_PRJ, high_PRJ = _load_two(
        rows,
        rows_R.to(tl.int64)[None, :, None],
        cols_PJ[:, None, :],
        inside_PJ[:, None, :] & (rows_R >= 0)[None, :, None],
        D,
        BITS,
        DTYPE,
        ASSEMBLE,
    )
    if BITS == 4:
        low_PJ = tl.load(scales + cols_PJ, mask=inside_PJ, other=0.0).to(DTYPE)
        high_PJ = tl.load(scales + D // 2 + cols_PJ, mask=inside_PJ, other=0.0).to(DTYPE)
        if SCALE_X:  # fewer numbers than weights
            x_PTJ, z_PTJ = x_PTJ * low_PJ[:, None, :], z_PTJ * high_PJ[:, None, :]
        else:
            low_PRJ, high_PRJ = low_PRJ * low_PJ[:, None, :], high_PRJ * high_PJ[:, None, :]
    sum_PRT = tl.dot(low_PRJ, tl.permute(x_PTJ, (0, 2, 1)), sum_PRT, input_precision="ieee")
    return tl.dot(high_PRJ, tl.permute(z_PTJ, (0, 2, 1)), sum_PRT, input_precision="ieee")


@triton.jit
def up(
    x,
    gate,
    up,
    gate_scales,
    up_scales,
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
    D: tl.constexpr,  # a constant, so that the second half of a row is known to be aligned
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
    PARTS: tl.constexpr,
    SCALE_X: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    ASSEMBLE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    first = tl.program_id(0) * ROWS  # ROWS neurons of one expert
    tokens_T = tl.arange(0, BLOCK_T)
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
    on_T = tl.sum(on_T1, axis=1)
    on = tl.max(on_T, axis=0)
    tl.store(wanted + first // N, on)
    if on != 0:
        rows_R = first + tl.arange(0, ROWS)
        scales = (first // GROUP).to(tl.int64) * D
        # each warp has its own columns, so that no warp repeats the work of another
        parts_PJ = tl.arange(0, PARTS)[:, None] * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
        up_PRT = tl.zeros([PARTS, ROWS, BLOCK_T], dtype=tl.float32)
        gate_PRT = tl.zeros([PARTS, ROWS, BLOCK_T], dtype=tl.float32)
        for start in tl.range(0, D // 2, PARTS * BLOCK_J):
            cols_PJ = start + parts_PJ
            inside_PTJ = (tokens_T < T)[None, :, None] & (cols_PJ < D // 2)[:, None, :]
            at_PTJ = x + tokens_T[None, :, None] * D + cols_PJ[:, None, :]
            x_PTJ = tl.load(at_PTJ, mask=inside_PTJ, other=0.0)
            z_PTJ = tl.load(at_PTJ + D // 2, mask=inside_PTJ, other=0.0)
            up_PRT = _multiply(
                up_PRT, up, up_scales + scales, x_PTJ, z_PTJ, rows_R, cols_PJ, D, BITS, SCALE_X, ASSEMBLE
            )
            if GATED:
                gate_PRT = _multiply(
                    gate_PRT, gate, gate_scales + scales, x_PTJ, z_PTJ, rows_R, cols_PJ, D, BITS, SCALE_X, ASSEMBLE
                )
        h_RT = tl.sum(up_PRT, axis=0)
        if BITS == 8:
            h_RT *= tl.load(up_scales + rows_R).to(tl.float32)[:, None]
        if HAS_UP_BIAS:
            h_RT += tl.load(up_bias + rows_R).to(tl.float32)[:, None]
        if GATED:
            gate_RT = tl.sum(gate_PRT, axis=0)
            if BITS == 8:
                gate_RT *= tl.load(gate_scales + rows_R).to(tl.float32)[:, None]
            if HAS_GATE_BIAS:
                gate_RT += tl.load(gate_bias + rows_R).to(tl.float32)[:, None]
            h_RT *= activate(gate_RT, ACT)
        else:
            h_RT = activate(h_RT, ACT)
        h_RT = tl.where((on_T != 0)[None, :], h_RT, 0.0)
        at_RT = hidden + tokens_T[None, :] * (E * N) + rows_R[:, None]
        tl.store(at_RT, h_RT.to(hidden.dtype.element_ty), mask=(tokens_T < T)[None, :])


@triton.jit
def down(
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
    UNITS: tl.constexpr = (N + ROWS - 1) // ROWS  # of an expert
    count = list_wanted(wanted, order, E, BLOCK_E) * UNITS
    tokens_T = tl.arange(0, BLOCK_T)
    cols_J = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    halves_C = tl.arange(0, 2 * BLOCK_J)
    cols_C = tl.program_id(0) * BLOCK_J + halves_C % BLOCK_J
    inside_C = cols_C < D // 2
    cols_C += halves_C // BLOCK_J * (D // 2)
    here_R = tl.arange(0, ROWS) < N  # an expert may be smaller than a product can be
    y_CT = tl.zeros([2 * BLOCK_J, BLOCK_T], dtype=tl.float32)
    for unit in tl.range((split * count) // splits, ((split + 1) * count) // splits, num_stages=1):
        first = tl.load(order + unit // UNITS) * N + unit % UNITS * ROWS
        rows_R = first + tl.arange(0, ROWS)
        h_TR = tl.load(
            hidden + tokens_T[:, None] * (E * N) + rows_R[None, :],
            mask=(tokens_T < T)[:, None] & here_R[None, :],
            other=0.0,
        )
        low_RJ, high_RJ = _load_two(
            down,
            rows_R.to(tl.int64)[:, None],
            cols_J[None, :],
            here_R[:, None] & (cols_J < D // 2)[None, :],
            D,
            BITS,
            h_TR.dtype,
            ASSEMBLE,
        )
        w_RC = tl.reshape(tl.permute(tl.join(low_RJ, high_RJ), (0, 2, 1)), [ROWS, 2 * BLOCK_J])
        if BITS == 4:
            by_C = tl.load(scales + (first // GROUP).to(tl.int64) * D + cols_C, mask=inside_C, other=0.0)
            y_CT += by_C.to(tl.float32)[:, None] * tl.dot(w_RC.T, h_TR.T, input_precision="ieee")
        else:
            y_CT = tl.dot(w_RC.T, h_TR.T, y_CT, input_precision="ieee")
    if BITS == 8:
        y_CT *= tl.load(scales + cols_C, mask=inside_C, other=0.0).to(tl.float32)[:, None]
    at_CT = partial + split * T * D + tokens_T[None, :] * D + cols_C[:, None]
    tl.store(at_CT, y_CT, mask=(tokens_T < T)[None, :] & inside_C[:, None])
