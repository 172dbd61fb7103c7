"""A sparse FFN: its steps, each for one of several threads.

A job holds addresses (0 for a tensor that is not there), codes of dtypes, and sizes. There are three steps, with a
barrier after each:
1. The router.
2. Each thread's share of the active neurons, with their part of the output, and its share of the rows of ``compress``.
3. The sum of the threads' parts, and the compensation of idle experts.
Shares depend only on the number of threads and on the active experts, so results are the same bit for bit.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numba import cfunc, from_dtype, njit, prange, types
from numba.np.numpy_support import carray

from lte.ops.cpu_kernels.matrices import add_rows, make_spare, matrix, multiply, scale_sums
from lte.ops.cpu_kernels.numbers import (
    STAMP,
    TAGS,
    barrier,
    compiled,
    entry,
    num_threads,
    pointer,
    read,
    thread_num,
    widen,
    write,
)
from lte.ops.weights import TENSORS

ROWS = 4
"""Weight rows that the inner loops take at once. The size of an expert is a multiple of this number."""

ACTS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}

_WEIGHTS = tuple(name.replace(".", "_") for name in TENSORS)
JOB_INTEGERS = ("x", "out", "active", "parts", "z", *_WEIGHTS, *(f"{name}_code" for name in _WEIGHTS))
JOB_INTEGERS += ("x_code", "routed", "T", "D", "F", "E", "R", "act", "norm", "norm_code")
JOB = np.dtype([*((name, np.int64) for name in JOB_INTEGERS), ("eps", np.float64), ("threshold", np.float64)])
"""Addresses of all tensors, codes of their dtypes, and sizes. ``parts`` holds a ``[T, D]`` for each thread, ``z`` is
``compress x + bias`` of the compensation, ``[T, R]``. With the address of a ``norm``, the FFN takes RMSNorm of x, and
its output is added to x."""

_READING = 4  # cost of reading a weight, in multiplications of it with a token's value
_JOB = from_dtype(JOB)


@compiled
def normalise(x_TD, norm, code, eps):
    """RMSNorm of each token, in place."""
    weight = np.empty(x_TD.shape[1], np.float32)
    read(norm, code, 0, weight)
    for t in range(x_TD.shape[0]):
        total = np.float32(0)
        for d in range(x_TD.shape[1]):
            total += x_TD[t, d] * x_TD[t, d]
        scale = np.float32(1) / np.sqrt(total / np.float32(x_TD.shape[1]) + np.float32(eps))
        for d in range(x_TD.shape[1]):
            x_TD[t, d] *= scale * weight[d]


@compiled
def activate(h, act):
    """The activation of each value, in place."""
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


@compiled
def add_bias(address, code, start, h, count):
    if address != 0:
        bias = np.empty(h.shape[1], np.float32)
        read(address, code, start, bias)
        for i in range(count):
            for k in range(h.shape[1]):
                h[i, k] += bias[k]


@compiled
def _tokens(job):
    x_TD = np.empty((job.T, job.D), np.float32)
    read(job.x, job.x_code, 0, x_TD.reshape(job.T * job.D))
    if job.norm != 0:
        normalise(x_TD, job.norm, job.norm_code, job.eps)
    return x_TD


@compiled
def route(job, thread, threads, tag):
    """Step one: this thread's share of the router's choices."""
    T, D, E = job.T, job.D, job.E
    active_TE = carray(pointer(job.active, np.uint8(0)), (T, E))
    router_ED = carray(pointer(job.router_matrix_rows, tag), (E, D))
    x_TD = _tokens(job)
    first, last = E * thread // threads, E * (thread + 1) // threads
    bias = np.zeros((1, last - first), np.float32)
    add_bias(job.router_bias, job.router_bias_code, first, bias, 1)
    scales = np.ones(last - first, np.float32)
    if job.router_matrix_scales != 0:
        read(job.router_matrix_scales, job.router_matrix_scales_code, first, scales)
    for e in range(first, last):
        for t in range(T):
            product = np.float32(0)
            for d in range(D):
                product += widen(router_ED[e, d]) * x_TD[t, d]
            active_TE[t, e] = product * scales[e - first] + bias[0, e - first] > np.float32(job.threshold)


@compiled
def compute(job, thread, threads, tag):
    """Step two: this thread's share of the active neurons, summed into its part of the output."""
    T, D, F, E = job.T, job.D, job.F, job.E
    N = F // E
    active_TE = carray(pointer(job.active, np.uint8(0)), (T, E))
    up_FD = matrix(job.up_matrix_rows, F, D, tag)
    gate_FD = matrix(job.gate_matrix_rows, F, D, tag)
    down_FD = matrix(job.down_matrix_rows, F, D, tag)
    up_scales, up_code = job.up_matrix_scales, job.up_matrix_scales_code
    gate_scales, gate_code = job.gate_matrix_scales, job.gate_matrix_scales_code
    down_scales, down_code = job.down_matrix_scales, job.down_matrix_scales_code
    spare = make_spare(T, D)
    y_TD = carray(pointer(job.parts + 4 * thread * T * D, np.float32(0)), (T, D))
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
        multiply(up_FD, up_scales, up_code, start, rows, x_TD, tokens, count, up, spare)
        add_bias(job.up_bias, job.up_bias_code, start, up, count)
        if job.gate_matrix_rows != 0:
            gate = gate_TN[: count * rows].reshape(count, rows)
            multiply(gate_FD, gate_scales, gate_code, start, rows, x_TD, tokens, count, gate, spare)
            add_bias(job.gate_bias, job.gate_bias_code, start, gate, count)
            activate(gate.reshape(count * rows), job.act)
            for i in range(count):
                for k in range(rows):
                    up[i, k] *= gate[i, k]
        else:
            activate(up.reshape(count * rows), job.act)
        add_rows(down_FD, down_scales, down_code, start, rows, up, tokens, count, y_TD, spare)
    scale_sums(down_FD, down_scales, down_code, y_TD)


@compiled
def compress(job, thread, threads):
    """With step two: this thread's share of the rows of ``compress``, times every token."""
    T, D, R = job.T, job.D, job.R
    z_TR = carray(pointer(job.z, np.float32(0)), (T, R))
    x_TD = _tokens(job)
    first, last = R * thread // threads, R * (thread + 1) // threads
    bias = np.zeros((1, last - first), np.float32)
    add_bias(job.compensation_bias, job.compensation_bias_code, first, bias, 1)
    row = np.empty(D, np.float32)
    for r in range(first, last):
        read(job.compensation_compress_rows, job.compensation_compress_rows_code, r * D, row)
        for t in range(T):
            product = bias[0, r - first]
            for d in range(D):
                product += row[d] * x_TD[t, d]
            z_TR[t, r] = product


@compiled
def _compensate(job, first, last, y_TD):
    """Add the compensation of idle experts to these columns."""
    T, E, R = job.T, job.E, job.R
    active_TE = carray(pointer(job.active, np.uint8(0)), (T, E))
    z_TR = carray(pointer(job.z, np.float32(0)), (T, R))
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
        read(job.compensation_expand_rows, job.compensation_expand_rows_code, start * R, rows)
        for t in range(T):
            for d in range(count):
                total = np.float32(0)
                for r in range(R):
                    total += rows_DR[d, r] * scaled_TR[t, r]
                y_TD[t, start + d] += total


@compiled
def collect(job, thread, threads):
    """Step three: the sum of all parts, the bias and the compensation, over this thread's share of the columns."""
    T, D = job.T, job.D
    parts = carray(pointer(job.parts, np.float32(0)), (threads, T, D))
    first, last = D // 16 * thread // threads * 16, D // 16 * (thread + 1) // threads * 16
    if thread + 1 == threads:
        last = D
    if job.R:
        _compensate(job, first, last, parts[0])
    y = np.empty((1, last - first), np.float32)
    for t in range(T):
        y[:] = 0
        if job.norm != 0:
            read(job.x, job.x_code, t * D + first, y[0])
        add_bias(job.down_bias, job.down_bias_code, first, y, 1)
        for part in range(threads):
            for d in range(first, last):
                y[0, d - first] += parts[part, t, d]
        write(job.out, job.x_code, t * D + first, y[0])


@cache
def region(dtype: torch.dtype, router_dtype: torch.dtype) -> int:
    """Return the address of the function that each OpenMP thread runs, compiled for these dtypes."""
    tag, router_tag, stamp = TAGS[dtype], TAGS[router_dtype], STAMP  # the stamp is a part of the key on disk

    @entry(cfunc, types.void(types.CPointer(_JOB)))
    def run(jobs):
        assert stamp
        job, thread, threads = carray(jobs, (1,))[0], thread_num(), num_threads()
        if job.routed:
            route(job, thread, threads, router_tag)
            barrier()
        if job.R:
            compress(job, thread, threads)
        compute(job, thread, threads, tag)
        barrier()
        collect(job, thread, threads)

    return run.address


@cache
def by_numba() -> Callable[..., None]:
    """Return the function that runs the same by Numba's threads. On some platforms only one caller may start them."""
    stamp = STAMP

    @entry(njit, parallel=True, nogil=True)
    def run(jobs, threads, tag, router_tag):
        assert stamp
        if jobs[0].routed:
            for thread in prange(threads):
                route(jobs[0], thread, threads, router_tag)
        for thread in prange(threads):
            if jobs[0].R:
                compress(jobs[0], thread, threads)
            compute(jobs[0], thread, threads, tag)
        for thread in prange(threads):
            collect(jobs[0], thread, threads)

    return run
