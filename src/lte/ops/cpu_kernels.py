"""The code that :mod:`lte.ops.cpu` runs, compiled by Numba: the steps of a sparse FFN, each for one of several threads.

A job holds addresses (0 for a tensor that is not there), codes of dtypes, and sizes. There are three steps, with a
barrier after each:
1. The router.
2. Each thread's share of the active neurons, with their part of the output, and its share of the rows of ``compress``.
3. The sum of the threads' parts, and the compensation of idle experts.
Shares depend only on the number of threads and on the active experts, so results are the same bit for bit.

All of it is in one file, because Numba's cache on disk looks at the date of one file only.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, from_dtype, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from lte.ops.weights import TENSORS

ROWS = 4
"""Weight rows that the inner loops take at once. The size of an expert is a multiple of this number."""

ACTS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Numba knows neither bf16 nor (on CPU) fp16: they are passed as integers of their width, and the sign tells which
TAGS = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0), torch.float16: np.int16(0)}

_WEIGHTS = tuple(name.replace(".", "_") for name in TENSORS)
JOB_INTEGERS = ("x", "out", "active", "parts", "z", *_WEIGHTS, *(f"{name}_code" for name in _WEIGHTS))
JOB_INTEGERS += ("x_code", "routed", "T", "D", "F", "E", "R", "act")
JOB = np.dtype([(name, np.int64) for name in JOB_INTEGERS] + [("threshold", np.float64)])
"""Addresses of all tensors, codes of their dtypes, and sizes. ``parts`` holds a ``[T, D]`` for each thread, ``z`` is
``compress x + bias`` of the compensation, ``[T, R]``."""

_READING = 4  # cost of reading a weight, in multiplications of it with a token's value
_JOB = from_dtype(JOB)
_intrinsic = cast(Callable[[Callable], Callable], intrinsic)  # Numba's own type has the context as an argument
_thread_num = types.ExternalFunction("omp_get_thread_num", types.int32())
_num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
_barrier = types.ExternalFunction("GOMP_barrier", types.void())


@_intrinsic
def _pointer(_context, address, tag):
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(tag)(address, tag), codegen


@_intrinsic
def _widen(_context, value):
    """A stored weight as fp32."""

    def codegen(context, builder, signature, args):
        single = context.get_value_type(types.float32)
        if value == types.uint16:
            word = context.get_value_type(types.uint32)
            return builder.bitcast(builder.shl(builder.zext(args[0], word), word(16)), single)
        if value == types.int16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), single)
        return args[0]

    return types.float32(value), codegen


@_intrinsic
def _narrow(_context, value, tag):
    """fp32 to what is stored, to nearest even."""

    def codegen(context, builder, signature, args):
        if tag == types.uint16:
            word = context.get_value_type(types.uint32)
            bits = builder.bitcast(args[0], word)
            odd = builder.and_(builder.lshr(bits, word(16)), word(1))
            rounded = builder.lshr(builder.add(bits, builder.add(odd, word(0x7FFF))), word(16))
            rounded = builder.select(builder.fcmp_unordered("uno", args[0], args[0]), word(0x7FC0), rounded)
            return builder.trunc(rounded, ir.IntType(16))
        if tag == types.int16:
            return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))
        return args[0]

    return tag(value, tag), codegen


@_intrinsic
def _fetch(_context, address):
    """Prefetch a cache line."""

    def codegen(context, builder, signature, args):
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [builder.inttoptr(args[0], pointer), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.none(types.uintp), codegen


def _cached(compiler: Callable[..., Any], *signature: Any, **options: Any) -> Callable[[Callable], Any]:
    """Return the compiler with its cache on disk, if it can be written there: then the next process starts fast."""

    def compile_(function: Callable) -> Any:
        try:
            return compiler(*signature, error_model="numpy", cache=True, **options)(function)
        except RuntimeError:
            return compiler(*signature, error_model="numpy", **options)(function)

    return compile_


# not all of fastmath: infinities and NaN must stay
_compiled = _cached(njit, fastmath={"reassoc", "contract", "nsz", "arcp"})


@_compiled
def _read(address, code, start, out):
    """Fill ``out`` with the values at ``address``, from index ``start`` on."""
    if code == 0:
        singles = carray(_pointer(address + 4 * start, np.float32(0)), out.shape)
        for i in range(out.shape[0]):
            out[i] = singles[i]
    elif code == 1:
        brains = carray(_pointer(address + 2 * start, np.uint16(0)), out.shape)
        for i in range(out.shape[0]):
            out[i] = _widen(brains[i])
    else:
        halves = carray(_pointer(address + 2 * start, np.int16(0)), out.shape)
        for i in range(out.shape[0]):
            out[i] = _widen(halves[i])


@_compiled
def _write(address, code, start, values):
    if code == 0:
        singles = carray(_pointer(address + 4 * start, np.float32(0)), values.shape)
        for i in range(values.shape[0]):
            singles[i] = values[i]
    elif code == 1:
        brains = carray(_pointer(address + 2 * start, np.uint16(0)), values.shape)
        for i in range(values.shape[0]):
            brains[i] = _narrow(values[i], np.uint16(0))
    else:
        halves = carray(_pointer(address + 2 * start, np.int16(0)), values.shape)
        for i in range(values.shape[0]):
            halves[i] = _narrow(values[i], np.int16(0))


@_compiled
def _fetch4(w, r):
    """Prefetch the beginnings of four rows. The processor's own prefetching does not look that far ahead."""
    for row in range(r, r + 4):
        for line in range(4):
            _fetch(w.ctypes.data + row * w.shape[1] * w.itemsize + 64 * line)


@_compiled
def _dot4(w, r, x, t):
    """Four rows of the weights times one token."""
    s0 = s1 = s2 = s3 = np.float32(0)
    for d in range(w.shape[1]):
        v = x[t, d]
        s0 += _widen(w[r, d]) * v
        s1 += _widen(w[r + 1, d]) * v
        s2 += _widen(w[r + 2, d]) * v
        s3 += _widen(w[r + 3, d]) * v
    return s0, s1, s2, s3


@_compiled
def _dot44(w, r, x, t0, t1, t2, t3, out, i, k):
    """Four rows of the weights times four tokens."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = np.float32(0)
    for d in range(w.shape[1]):
        w0, w1, w2, w3 = _widen(w[r, d]), _widen(w[r + 1, d]), _widen(w[r + 2, d]), _widen(w[r + 3, d])
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


@_compiled
def _multiply(w, first, rows, x, tokens, count, out):
    """``out[i, k] = x[tokens[i]] . w[first + k]``; each group of rows is read once for all tokens."""
    for k in range(0, rows, 4):
        if k + 4 < rows:
            _fetch4(w, first + k + 4)
        i = 0
        while i + 4 <= count:
            _dot44(w, first + k, x, tokens[i], tokens[i + 1], tokens[i + 2], tokens[i + 3], out, i, k)
            i += 4
        while i < count:
            out[i, k], out[i, k + 1], out[i, k + 2], out[i, k + 3] = _dot4(w, first + k, x, tokens[i])
            i += 1


@_compiled
def _axpy4(w, r, h, i, k, y, t):
    """Add four rows of the weights, scaled, to one token's output."""
    h0, h1, h2, h3 = h[i, k], h[i, k + 1], h[i, k + 2], h[i, k + 3]
    for d in range(w.shape[1]):
        y[t, d] += h0 * _widen(w[r, d]) + h1 * _widen(w[r + 1, d]) + h2 * _widen(w[r + 2, d]) + h3 * _widen(w[r + 3, d])


@_compiled
def _add_rows(w, first, rows, h, tokens, count, y):
    """``y[tokens[i]] += sum of h[i, k] * w[first + k]``."""
    for k in range(0, rows, 4):
        if k + 4 < rows:
            _fetch4(w, first + k + 4)
        for i in range(count):
            _axpy4(w, first + k, h, i, k, y, tokens[i])


@_compiled
def _activate(h, act):
    if act == 0:
        for k in range(h.shape[0]):
            h[k] = h[k] / (np.float32(1) + math.exp(-h[k]))
    elif act == 1:
        for k in range(h.shape[0]):
            h[k] = np.float32(0.5) * h[k] * (np.float32(1) + math.erf(h[k] * np.float32(math.sqrt(0.5))))
    elif act == 2:
        for k in range(h.shape[0]):
            inner = np.float32(math.sqrt(2 / math.pi)) * (h[k] + np.float32(0.044715) * h[k] * h[k] * h[k])
            h[k] = np.float32(0.5) * h[k] * (np.float32(1) + math.tanh(inner))
    else:
        for k in range(h.shape[0]):
            kept = max(h[k], np.float32(0))
            h[k] = kept if act == 3 else kept * kept


@_compiled
def _add_bias(address, code, start, h, count):
    if address != 0:
        bias = np.empty(h.shape[1], np.float32)
        _read(address, code, start, bias)
        for i in range(count):
            for k in range(h.shape[1]):
                h[i, k] += bias[k]


@_compiled
def _tokens(job):
    x_TD = np.empty((job.T, job.D), np.float32)
    _read(job.x, job.x_code, 0, x_TD.reshape(job.T * job.D))
    return x_TD


@_compiled
def _route(job, thread, threads, tag):
    """Step one: this thread's share of the router's choices."""
    T, D, E = job.T, job.D, job.E
    active_TE = carray(_pointer(job.active, np.uint8(0)), (T, E))
    router_ED = carray(_pointer(job.router_matrix_rows, tag), (E, D))
    x_TD = _tokens(job)
    first, last = E * thread // threads, E * (thread + 1) // threads
    bias = np.zeros((1, last - first), np.float32)
    _add_bias(job.router_bias, job.router_bias_code, first, bias, 1)
    for e in range(first, last):
        for t in range(T):
            logit = bias[0, e - first]
            for d in range(D):
                logit += _widen(router_ED[e, d]) * x_TD[t, d]
            active_TE[t, e] = logit > np.float32(job.threshold)


@_compiled
def _compute(job, thread, threads, tag):
    """Step two: this thread's share of the active neurons, summed into its part of the output."""
    T, D, F, E = job.T, job.D, job.F, job.E
    N = F // E
    active_TE = carray(_pointer(job.active, np.uint8(0)), (T, E))
    up_FD = carray(_pointer(job.up_matrix_rows, tag), (F, D))
    gate_FD = carray(_pointer(job.gate_matrix_rows, tag), (F, D))
    down_FD = carray(_pointer(job.down_matrix_rows, tag), (F, D))
    y_TD = carray(_pointer(job.parts + 4 * thread * T * D, np.float32(0)), (T, D))
    y_TD[:] = 0
    x_TD = _tokens(job)
    tokens = np.empty(T, np.int64)
    up_TN = np.empty(T * N, np.float32)
    gate_TN = np.empty(T * N, np.float32)

    # the cost of four rows is that of reading them, plus the arithmetic for each token that uses them
    total = 0
    for e in range(E):
        count = 0
        for t in range(T):
            count += active_TE[t, e]
        total += (_READING + count) * (N // 4) if count else 0
    begin, end = total * thread // threads, total * (thread + 1) // threads

    position = 0
    for e in range(E):
        count = 0
        for t in range(T):
            if active_TE[t, e]:
                tokens[count] = t
                count += 1
        if count == 0:
            continue
        cost = _READING + count
        first = min(max(-((position - begin) // cost), 0), N // 4) * 4
        last = min(max(-((position - end) // cost), 0), N // 4) * 4
        position += cost * (N // 4)
        if first >= last:
            continue
        rows, start = last - first, e * N + first
        up = up_TN[: count * rows].reshape(count, rows)
        _multiply(up_FD, start, rows, x_TD, tokens, count, up)
        _add_bias(job.up_bias, job.up_bias_code, start, up, count)
        if job.gate_matrix_rows != 0:
            gate = gate_TN[: count * rows].reshape(count, rows)
            _multiply(gate_FD, start, rows, x_TD, tokens, count, gate)
            _add_bias(job.gate_bias, job.gate_bias_code, start, gate, count)
            _activate(gate.reshape(count * rows), job.act)
            for i in range(count):
                for k in range(rows):
                    up[i, k] *= gate[i, k]
        else:
            _activate(up.reshape(count * rows), job.act)
        _add_rows(down_FD, start, rows, up, tokens, count, y_TD)


@_compiled
def _compress(job, thread, threads):
    """With step two: this thread's share of the rows of ``compress``, times every token."""
    T, D, R = job.T, job.D, job.R
    z_TR = carray(_pointer(job.z, np.float32(0)), (T, R))
    x_TD = _tokens(job)
    first, last = R * thread // threads, R * (thread + 1) // threads
    bias = np.zeros((1, last - first), np.float32)
    _add_bias(job.compensation_bias, job.compensation_bias_code, first, bias, 1)
    row = np.empty(D, np.float32)
    for r in range(first, last):
        _read(job.compensation_compress_rows, job.compensation_compress_rows_code, r * D, row)
        for t in range(T):
            product = bias[0, r - first]
            for d in range(D):
                product += row[d] * x_TD[t, d]
            z_TR[t, r] = product


@_compiled
def _compensate(job, first, last, y_TD):
    """Add the compensation of idle experts to these columns."""
    T, E, R = job.T, job.E, job.R
    active_TE = carray(_pointer(job.active, np.uint8(0)), (T, E))
    z_TR = carray(_pointer(job.z, np.float32(0)), (T, R))
    scaled_TR = np.empty((T, R), np.float32)
    for t in range(T):
        count = 0
        for e in range(E):
            count += active_TE[t, e]
        idle = np.float32(1 - count / E)
        for r in range(R):
            scaled_TR[t, r] = idle * z_TR[t, r]
    rows_DR = np.empty((16, R), np.float32)
    for start in range(first, last, 16):
        count = min(16, last - start)
        rows = rows_DR[:count].reshape(count * R)
        _read(job.compensation_expand_rows, job.compensation_expand_rows_code, start * R, rows)
        for t in range(T):
            for d in range(count):
                total = np.float32(0)
                for r in range(R):
                    total += rows_DR[d, r] * scaled_TR[t, r]
                y_TD[t, start + d] += total


@_compiled
def _collect(job, thread, threads):
    """Step three: the sum of all parts, the bias and the compensation, over this thread's share of the columns."""
    T, D = job.T, job.D
    parts = carray(_pointer(job.parts, np.float32(0)), (threads, T, D))
    first, last = D // 16 * thread // threads * 16, D // 16 * (thread + 1) // threads * 16
    if thread + 1 == threads:
        last = D
    if job.R:
        _compensate(job, first, last, parts[0])
    y = np.empty((1, last - first), np.float32)
    for t in range(T):
        y[:] = 0
        _add_bias(job.down_bias, job.down_bias_code, first, y, 1)
        for part in range(threads):
            for d in range(first, last):
                y[0, d - first] += parts[part, t, d]
        _write(job.out, job.x_code, t * D + first, y[0])


@cache
def region(dtype: torch.dtype, router_dtype: torch.dtype) -> int:
    """Return the address of the function that each OpenMP thread runs, compiled for these dtypes."""
    tag, router_tag = TAGS[dtype], TAGS[router_dtype]

    @_cached(cfunc, types.void(types.CPointer(_JOB)))
    def run(jobs):
        job, thread, threads = carray(jobs, (1,))[0], _thread_num(), _num_threads()
        if job.routed:
            _route(job, thread, threads, router_tag)
            _barrier()
        if job.R:
            _compress(job, thread, threads)
        _compute(job, thread, threads, tag)
        _barrier()
        _collect(job, thread, threads)

    return run.address


@_cached(njit, parallel=True, nogil=True)
def run_by_numba(jobs, threads, tag, router_tag):
    """Run the same by Numba's threads. On some platforms only one caller at a time may start them."""
    if jobs[0].routed:
        for thread in prange(threads):
            _route(jobs[0], thread, threads, router_tag)
    for thread in prange(threads):
        if jobs[0].R:
            _compress(jobs[0], thread, threads)
        _compute(jobs[0], thread, threads, tag)
    for thread in prange(threads):
        _collect(jobs[0], thread, threads)
