"""Numbers of 4 or 8 bits, read as words of 32 bits. How they are stored: :class:`lte.ops.weights.Matrix`.

A word has ``32 // BITS`` lanes. The number of a lane is shifted into the mantissa of a power of two: a float whose
mantissa holds q is ``256 + q``. This takes two instructions a number, and a conversion from integers takes more. The
power and the zero point are subtracted once for many numbers (:func:`offset`).
"""
# pyright: basic, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# ruff: noqa: RUF005 (Triton adds tuples, and does not unpack them)

import triton
import triton.language as tl

MASKS = {8: (0x7F8000, 0), 4: (0x78000, 0x780000)}
"""``low_mask`` and ``high_mask`` of :func:`lane`. As arguments of a kernel they are in registers, which saves time."""


@triton.jit
def load_words(words, rows_R, words_W, inside_RW, width, BITS: tl.constexpr):
    """Return the words ``[R, W]`` of these rows, for :func:`lane`. ``width`` is the number of words of a row."""
    words_RW = tl.load(words + rows_R.to(tl.int64)[:, None] * width + words_W[None, :], mask=inside_RW, other=0)
    if BITS == 8:
        words_RW ^= -0x7F7F7F80  # 0x80 in each byte: q + 128 without sign
    return words_RW


@triton.jit
def lane(words, K: tl.constexpr, low_mask, high_mask, BITS: tl.constexpr):
    """Return the numbers of lane K in fp32, each plus :func:`offset`."""
    byte: tl.constexpr = K * BITS // 8
    shifted = words << (15 - 8 * byte) if byte < 2 else words >> (8 * byte - 15)
    if BITS == 4 and K % 2 == 1:
        return ((shifted & high_mask) | 0x41800000).to(tl.float32, bitcast=True)  # 16 + q
    else:
        return ((shifted & low_mask) | 0x43800000).to(tl.float32, bitcast=True)  # 256 + q


@triton.jit
def offset(K: tl.constexpr, BITS: tl.constexpr):
    """Return what :func:`lane` has too much."""
    return 256.0 + 128.0 if BITS == 8 else 256.0 + 8.0 if K % 2 == 0 else 16.0 + 8.0


@triton.jit
def load_lanes(values, words_W, inside_W, D, BITS: tl.constexpr):
    """Return, lane by lane, the ``values`` ``[D]`` at the columns of these words: a tuple of fp32 ``[W]``."""
    if BITS == 8:
        return _load_four(values, words_W, inside_W)
    else:
        low = _load_four(values, words_W, inside_W)
        high = _load_four(values + D // 2, words_W, inside_W)
        return low[0], high[0], low[1], high[1], low[2], high[2], low[3], high[3]


@triton.jit
def _load_four(values, words_W, inside_W):
    four = ()
    dtype: tl.constexpr = values.dtype.element_ty
    if dtype.primitive_bitwidth == 16:  # one load of 64 bits: four loads of 16 would not be contiguous
        bits_W = tl.load(values.to(tl.pointer_type(tl.int64)) + words_W, mask=inside_W, other=0)
        for i in tl.static_range(4):
            four = four + ((bits_W >> 16 * i).to(tl.int16).to(dtype, bitcast=True).to(tl.float32),)
    else:
        for i in tl.static_range(4):
            four = four + (tl.load(values + 4 * words_W + i, mask=inside_W, other=0.0).to(tl.float32),)
    return four


@triton.jit
def store_lanes(at, lanes, words_W, inside_W, D, BITS: tl.constexpr):
    """Store what :func:`load_lanes` would load."""
    if BITS == 8:
        _store_four(at, lanes[0], lanes[1], lanes[2], lanes[3], words_W, inside_W)
    else:
        _store_four(at, lanes[0], lanes[2], lanes[4], lanes[6], words_W, inside_W)
        _store_four(at + D // 2, lanes[1], lanes[3], lanes[5], lanes[7], words_W, inside_W)


@triton.jit
def _store_four(at, a_W, b_W, c_W, d_W, words_W, inside_W):
    four_W22 = tl.join(tl.join(a_W, c_W), tl.join(b_W, d_W))
    cols_W22 = 4 * words_W[:, None, None] + 2 * tl.arange(0, 2)[None, :, None] + tl.arange(0, 2)[None, None, :]
    tl.store(at + cols_W22, four_W22, mask=inside_W[:, None, None])
