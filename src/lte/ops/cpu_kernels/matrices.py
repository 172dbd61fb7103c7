"""Rows of a matrix times tokens, and multiples of rows added to tokens, for each form of :class:`Matrix`.

``w`` is ``[R, D]`` of floats or int8, or ``[R, D/2]`` of bytes that hold two numbers of 4 bits. Rows come in fours.
Arithmetic is in fp32. Scales never multiply a weight. With int8 they multiply the sum of an output. With 4 bits a
group of rows shares a scale in each column, which multiplies the token's value there.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload
from numba.np.numpy_support import carray

from lte.ops.cpu_kernels.numbers import FAST, compiled, fetch, high, low, pointer, read, widen
from lte.ops.weights import INT4_GROUP


@compiled
def _fetch4(w, r):
    """Prefetch the beginnings of four rows. The processor's own prefetching does not look that far ahead."""
    for row in range(r, r + 4):
        for line in range(4):
            fetch(w.ctypes.data + row * w.shape[1] * w.itemsize + 64 * line)


@compiled
def _dot4(w, r, x, t):
    """Four rows of the weights times one token."""
    s0 = s1 = s2 = s3 = np.float32(0)
    for d in range(w.shape[1]):
        v = x[t, d]
        s0 += widen(w[r, d]) * v
        s1 += widen(w[r + 1, d]) * v
        s2 += widen(w[r + 2, d]) * v
        s3 += widen(w[r + 3, d]) * v
    return s0, s1, s2, s3


@compiled
def _dot44(w, r, x, t0, t1, t2, t3, out, i, k):
    """Four rows of the weights times four tokens."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = np.float32(0)
    for d in range(w.shape[1]):
        w0, w1, w2, w3 = widen(w[r, d]), widen(w[r + 1, d]), widen(w[r + 2, d]), widen(w[r + 3, d])
        v = x[t0, d]
        a0 += w0 * v
        a1 += w1 * v
        a2 += w2 * v
        a3 += w3 * v
        v = x[t1, d]
        b0 += w0 * v
        b1 += w1 * v
        b2 += w2 * v
        b3 += w3 * v
        v = x[t2, d]
        c0 += w0 * v
        c1 += w1 * v
        c2 += w2 * v
        c3 += w3 * v
        v = x[t3, d]
        d0 += w0 * v
        d1 += w1 * v
        d2 += w2 * v
        d3 += w3 * v
    out[i, k], out[i, k + 1], out[i, k + 2], out[i, k + 3] = a0, a1, a2, a3
    out[i + 1, k], out[i + 1, k + 1], out[i + 1, k + 2], out[i + 1, k + 3] = b0, b1, b2, b3
    out[i + 2, k], out[i + 2, k + 1], out[i + 2, k + 2], out[i + 2, k + 3] = c0, c1, c2, c3
    out[i + 3, k], out[i + 3, k + 1], out[i + 3, k + 2], out[i + 3, k + 3] = d0, d1, d2, d3


@compiled
def _dots(w, r, x, tokens, count, out, k):
    """Four rows of the weights times all tokens."""
    i = 0
    while i + 4 <= count:
        _dot44(w, r, x, tokens[i], tokens[i + 1], tokens[i + 2], tokens[i + 3], out, i, k)
        i += 4
    while i < count:
        out[i, k], out[i, k + 1], out[i, k + 2], out[i, k + 3] = _dot4(w, r, x, tokens[i])
        i += 1


@compiled
def _axpy4(w, r, h, i, k, y, t):
    """Add four rows of the weights, scaled, to one token's output."""
    h0, h1, h2, h3 = h[i, k], h[i, k + 1], h[i, k + 2], h[i, k + 3]
    for d in range(w.shape[1]):
        y[t, d] += h0 * widen(w[r, d]) + h1 * widen(w[r + 1, d]) + h2 * widen(w[r + 2, d]) + h3 * widen(w[r + 3, d])


@compiled
def _multiply_rows(w, first, rows, x, tokens, count, out):
    for k in range(0, rows, 4):
        if k + 4 < rows:
            _fetch4(w, first + k + 4)
        _dots(w, first + k, x, tokens, count, out, k)


@compiled
def _add_all(w, first, rows, h, tokens, count, y):
    for k in range(0, rows, 4):
        if k + 4 < rows:
            _fetch4(w, first + k + 4)
        for i in range(count):
            _axpy4(w, first + k, h, i, k, y, tokens[i])


@compiled
def _scale(scales, code, first, h, count):
    """Multiply column k of ``h`` by the scale of row first + k."""
    scale = np.empty(h.shape[1], np.float32)
    read(scales, code, first, scale)
    for i in range(count):
        for k in range(h.shape[1]):
            h[i, k] *= scale[k]


@compiled
def _dot4_nibbles(w, r, x, t):
    half = w.shape[1]
    s0 = s1 = s2 = s3 = np.float32(0)
    for d in range(half):
        a, b = x[t, d], x[t, half + d]
        w0, w1, w2, w3 = w[r, d], w[r + 1, d], w[r + 2, d], w[r + 3, d]
        s0 += low(w0) * a + high(w0) * b
        s1 += low(w1) * a + high(w1) * b
        s2 += low(w2) * a + high(w2) * b
        s3 += low(w3) * a + high(w3) * b
    return s0, s1, s2, s3


@compiled
def _axpy4_nibbles(w, r, h, i, k, y):
    half = w.shape[1]
    h0, h1, h2, h3 = h[i, k], h[i, k + 1], h[i, k + 2], h[i, k + 3]
    for d in range(half):
        w0, w1, w2, w3 = w[r, d], w[r + 1, d], w[r + 2, d], w[r + 3, d]
        y[i, d] += h0 * low(w0) + h1 * low(w1) + h2 * low(w2) + h3 * low(w3)
        y[i, half + d] += h0 * high(w0) + h1 * high(w1) + h2 * high(w2) + h3 * high(w3)


@compiled
def _unpack4(w, r, out):
    """Write four rows of numbers from 0 to 15 as fp32."""
    half = w.shape[1]
    for k in range(4):
        for d in range(half):
            out[k, d] = low(w[r + k, d])
            out[k, half + d] = high(w[r + k, d])


@compiled
def _multiply_nibbles(w, scales, code, first, rows, x, tokens, count, out, spare):
    D, T = x.shape[1], x.shape[0]
    scaled, unpacked, scale = spare[:T], spare[2 * T : 2 * T + 4], spare[2 * T + 4]
    eights, order = np.empty(count, np.float32), np.arange(count)
    start = 0
    while start < rows:
        group = (first + start) // INT4_GROUP
        end = min(rows, (group + 1) * INT4_GROUP - first)
        read(scales, code, group * D, scale)
        for i in range(count):
            total = np.float32(0)
            for d in range(D):
                value = scale[d] * x[tokens[i], d]
                scaled[i, d] = value
                total += value
            eights[i] = np.float32(8) * total
        for k in range(start, end, 4):
            if k + 4 < rows:
                _fetch4(w, first + k + 4)
            if count == 1:
                out[0, k], out[0, k + 1], out[0, k + 2], out[0, k + 3] = _dot4_nibbles(w, first + k, scaled, 0)
            else:
                _unpack4(w, first + k, unpacked)
                _dots(unpacked, 0, scaled, order, count, out, k)
            for i in range(count):
                for j in range(k, k + 4):
                    out[i, j] -= eights[i]
        start = end


@compiled
def _add_nibbles(w, scales, code, first, rows, h, tokens, count, y, spare):
    D, T = y.shape[1], y.shape[0]
    sums, unpacked, scale = spare[T : 2 * T], spare[2 * T : 2 * T + 4], spare[2 * T + 4]
    start = 0
    while start < rows:
        group = (first + start) // INT4_GROUP
        end = min(rows, (group + 1) * INT4_GROUP - first)
        read(scales, code, group * D, scale)
        for i in range(count):
            eights = np.float32(0)
            for k in range(start, end):
                eights += np.float32(8) * h[i, k]
            for d in range(D):
                sums[i, d] = -eights
        for k in range(start, end, 4):
            if k + 4 < rows:
                _fetch4(w, first + k + 4)
            if count == 1:
                _axpy4_nibbles(w, first + k, h, 0, k, sums)
            else:
                _unpack4(w, first + k, unpacked)
                for i in range(count):
                    _axpy4(unpacked, 0, h, i, k, sums, i)
        for i in range(count):
            for d in range(D):
                y[tokens[i], d] += scale[d] * sums[i, d]
        start = end


def multiply(w, scales, code, first, rows, x, tokens, count, out, spare):
    """``out[i, k] = x[tokens[i]] . row first + k``; each four rows are read once for all tokens.

    ``scales`` is the address of the scales and ``code`` their dtype. ``spare`` is as :func:`make_spare` makes it.
    """
    raise NotImplementedError  # in Numba alone, by the dtype of w


def add_rows(w, scales, code, first, rows, h, tokens, count, y, spare):
    """``y[tokens[i]] += sum of h[i, k] * row first + k``. Call :func:`scale_sums` after the last rows."""
    raise NotImplementedError


def scale_sums(w, scales, code, y):
    """Multiply sums of rows by the scales of columns, which a matrix of int8 has where its columns are outputs."""
    raise NotImplementedError


@compiled
def make_spare(T, D):
    """Room for two copies of the tokens, four rows and one row of scales."""
    return np.empty((2 * T + 5, D), np.float32)


@compiled
def matrix(address, R, D, tag):
    """The rows at an address as an array."""
    return carray(pointer(address, tag), (R, D // _numbers(tag)))


def _numbers(tag):
    raise NotImplementedError


@overload(_numbers)
def _(tag):
    count = 2 if tag == types.uint8 else 1
    return lambda tag: count


_OPTIONS: Any = {"jit_options": FAST}


@overload(multiply, **_OPTIONS)
def _(w, scales, code, first, rows, x, tokens, count, out, spare):
    if w.dtype == types.uint8:
        return lambda w, scales, code, first, rows, x, tokens, count, out, spare: _multiply_nibbles(
            w, scales, code, first, rows, x, tokens, count, out, spare
        )
    quantised = w.dtype == types.int8

    def floats(w, scales, code, first, rows, x, tokens, count, out, spare):
        _multiply_rows(w, first, rows, x, tokens, count, out)
        if quantised:
            _scale(scales, code, first, out, count)

    return floats


@overload(add_rows, **_OPTIONS)
def _(w, scales, code, first, rows, h, tokens, count, y, spare):
    if w.dtype == types.uint8:
        return lambda w, scales, code, first, rows, h, tokens, count, y, spare: _add_nibbles(
            w, scales, code, first, rows, h, tokens, count, y, spare
        )
    return lambda w, scales, code, first, rows, h, tokens, count, y, spare: _add_all(
        w, first, rows, h, tokens, count, y
    )


@overload(scale_sums, **_OPTIONS)
def _(w, scales, code, y):
    if w.dtype != types.int8:
        return lambda w, scales, code, y: None
    return lambda w, scales, code, y: _scale(scales, code, 0, y, y.shape[0])
