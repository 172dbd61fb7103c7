"""A decoding step of a Llama-like model, for one of several threads: one token of each text, all layers, in one call.

Layers hold addresses, codes of dtypes and sizes, as the job of an FFN does. All threads meet at a barrier after each
part of a layer. The residual stream ``x`` is in fp32.
"""

import math
from functools import cache

import numpy as np
import torch
from numba import cfunc, from_dtype, types
from numba.np.numpy_support import carray

from lte.ops.cpu_kernels.ffn import activate, add_bias, normalise
from lte.ops.cpu_kernels.matrices import add_rows, make_spare, matrix, multiply
from lte.ops.cpu_kernels.numbers import (
    STAMP,
    TAGS,
    barrier,
    call,
    compiled,
    entry,
    num_threads,
    pointer,
    read,
    records,
    thread_num,
    widen,
    write,
)

_UNIT = 32  # rows of a thread's share: a group of 4 bits stays whole
_LINEAR_FIELDS = ("run", "rows", "scales", "scales_code", "bias", "bias_code", "R", "D")
LINEAR = np.dtype([(name, np.int64) for name in _LINEAR_FIELDS])
"""A projection: addresses, the shape of its matrix, and the function that computes it, :func:`projection`."""

_LAYER_FIELDS = ("norm", "q", "k", "v", "o", "q_norm", "k_norm", "keys", "values", "window", "attend")
_LAYER_FIELDS += ("ffn_norm", "ffn", "ffn_run", "gate", "up", "down")
LAYER = np.dtype([(name, np.int64) for name in _LAYER_FIELDS])
"""A layer: addresses of norms' weights, of :data:`LINEAR` records, of keys and values ``[T, KV, S, d]``, of a sparse
FFN's job (0 for a dense FFN, which has gate, up and down), and of functions: :func:`attention` and
:func:`~lte.ops.cpu_kernels.ffn.region`. The norms' weights have the dtype of :data:`STEP`'s ``code``."""

STEP = np.dtype(
    [
        *((name, np.int64) for name in ("layers", "count", "code", "T", "D", "H", "KV", "d", "S", "V", "F", "act")),
        *((name, np.int64) for name in ("ids", "slots", "cos", "sin", "embedding", "norm", "head")),
        *((name, np.int64) for name in ("x", "q", "k", "v", "mixed", "hidden", "gate", "logits")),
        *((name, np.float64) for name in ("eps", "scaling")),
    ]
)
"""A step: its layers, sizes, the tokens and their slots (int64 ``[T]``), tables of cos and sin (fp32 ``[S, d]``), the
head, and room for what passes between threads (fp32)."""

_steps_at, _layers_at, _linears_at = (records(from_dtype(one)) for one in (STEP, LAYER, LINEAR))
_INTEGERS = types.void(*[types.int64] * 7)


@compiled
def _floats(address, rows, columns):
    return carray(pointer(address, np.float32(0)), (rows, columns))


@compiled
def _normed(step, norm):
    """The residual stream, normalised, in memory of this thread."""
    x_TD = _floats(step.x, step.T, step.D).copy()
    normalise(x_TD, norm, step.code, step.eps)
    return x_TD


@compiled
def _project(linear_at, x_TD, out_TR, add, thread, threads):
    linear = carray(_linears_at(linear_at), (1,))[0]
    call(linear.run, (linear_at, x_TD.ctypes.data, out_TR.ctypes.data, x_TD.shape[0], add, thread, threads))


@cache
def projection(dtype: torch.dtype) -> int:
    """Return the address of the function for matrices that are stored so: one thread's share of a projection's rows.

    With ``add`` they are added to what is there.
    """
    tag, stamp = TAGS[dtype], STAMP  # the stamp is a part of the key on disk

    @entry(cfunc, _INTEGERS)
    def run(linear_at, x, out, T, add, thread, threads):
        assert stamp
        linear = carray(_linears_at(linear_at), (1,))[0]
        R, D = linear.R, linear.D
        x_TD, out_TR, w_RD = _floats(x, T, D), _floats(out, T, R), matrix(linear.rows, R, D, tag)
        units = (R + _UNIT - 1) // _UNIT
        tokens, spare, part = np.arange(T), make_spare(T, D), np.empty(T * _UNIT, np.float32)
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            first = unit * _UNIT
            rows = min(_UNIT, R - first)
            part_TU = part[: T * rows].reshape(T, rows)
            multiply(w_RD, linear.scales, linear.scales_code, first, rows, x_TD, tokens, T, part_TU, spare)
            add_bias(linear.bias, linear.bias_code, first, part_TU, T)
            for t in range(T):
                for k in range(rows):
                    before = out_TR[t, first + k] if add else np.float32(0)
                    out_TR[t, first + k] = before + part_TU[t, k]

    return run.address


@compiled
def _rotated(step, states, norm, slot):
    """A head's query or key ``[1, d]`` with its norm, if there is one, and its place in the text."""
    d = step.d
    head, out = states.copy().reshape(1, d), np.empty((1, d), np.float32)
    if norm != 0:
        normalise(head, norm, step.code, step.eps)
    cos, sin = _floats(step.cos, step.S, d), _floats(step.sin, step.S, d)
    half = d // 2
    for i in range(half):
        out[0, i] = head[0, i] * cos[slot, i] - head[0, half + i] * sin[slot, i]
        out[0, half + i] = head[0, half + i] * cos[slot, half + i] + head[0, i] * sin[slot, half + i]
    return out


@compiled
def _exponentials(scores, count):
    """Replace scores by the softmax over the first ``count``; the rest becomes 0."""
    most = scores[0, 0]
    for s in range(count):
        most = max(most, scores[0, s])
    total = np.float32(0)
    for s in range(count):
        scores[0, s] = math.exp(scores[0, s] - most)
        total += scores[0, s]
    for s in range(count):
        scores[0, s] /= total


@compiled
def _attend(step, layer, thread, threads, tag):
    """This thread's share of the heads. The new key and value are used as computed, and stored by one head of each."""
    T, H, KV, d, S = step.T, step.H, step.KV, step.d, step.S
    q_TR, out_TR = _floats(step.q, T, H * d), _floats(step.mixed, T, H * d)
    k_TR, v_TR = _floats(step.k, T, KV * d), _floats(step.v, T, KV * d)
    slot_T = carray(pointer(step.slots, np.int64(0)), (T,))
    keys = carray(pointer(layer.keys, tag), (T * KV * S, d))
    values = carray(pointer(layer.values, tag), (T * KV * S, d))
    scores, one, spare = np.empty((1, S), np.float32), np.zeros(1, np.int64), make_spare(1, d)
    for unit in range(T * H * thread // threads, T * H * (thread + 1) // threads):
        t, h = unit // H, unit % H
        slot, g = slot_T[t], h // (H // KV)
        begin = (t * KV + g) * S
        q = _rotated(step, q_TR[t, h * d : (h + 1) * d], layer.q_norm, slot)
        k = _rotated(step, k_TR[t, g * d : (g + 1) * d], layer.k_norm, slot)
        v = v_TR[t, g * d : (g + 1) * d]
        if h % (H // KV) == 0:
            write(layer.keys, step.code, (begin + slot) * d, k[0])
            write(layer.values, step.code, (begin + slot) * d, v)
        first = max(0, slot - layer.window + 1) if layer.window else 0
        earlier = slot - first
        fours = earlier // 4 * 4
        multiply(keys, 0, 0, begin + first, fours, q, one, 1, scores, spare)
        for s in range(fours, earlier):
            total = np.float32(0)
            for i in range(d):
                total += q[0, i] * widen(keys[begin + first + s, i])
            scores[0, s] = total
        total = np.float32(0)
        for i in range(d):
            total += q[0, i] * k[0, i]
        scores[0, earlier] = total
        for s in range(earlier + 1):
            scores[0, s] *= np.float32(step.scaling)
        _exponentials(scores, earlier + 1)
        out = np.zeros((1, d), np.float32)
        add_rows(values, 0, 0, begin + first, fours, scores, one, 1, out, spare)
        for s in range(fours, earlier):
            for i in range(d):
                out[0, i] += scores[0, s] * widen(values[begin + first + s, i])
        for i in range(d):
            out_TR[t, h * d + i] = out[0, i] + scores[0, earlier] * v[i]


@cache
def attention(dtype: torch.dtype) -> int:
    """Return the address of the function for keys and values of this dtype: one thread's share of a layer's heads."""
    tag, stamp = TAGS[dtype], STAMP  # the stamp is a part of the key on disk

    @entry(cfunc, _INTEGERS)
    def run(step_at, layer_at, thread, threads, _1, _2, _3):
        assert stamp
        step, layer = carray(_steps_at(step_at), (1,))[0], carray(_layers_at(layer_at), (1,))[0]
        _attend(step, layer, thread, threads, tag)

    return run.address


@compiled
def _dense(step, layer, thread, threads):
    """A dense FFN. A thread's shares of gate and up are the same neurons."""
    T, F = step.T, step.F
    normed_TD, hidden_TF, gate_TF = _normed(step, layer.ffn_norm), _floats(step.hidden, T, F), _floats(step.gate, T, F)
    _project(layer.gate, normed_TD, gate_TF, 0, thread, threads)
    _project(layer.up, normed_TD, hidden_TF, 0, thread, threads)
    units = (F + _UNIT - 1) // _UNIT
    first, last = units * thread // threads * _UNIT, min(F, units * (thread + 1) // threads * _UNIT)
    for t in range(T):
        activate(gate_TF[t, first:last], step.act)
        for k in range(first, last):
            hidden_TF[t, k] *= gate_TF[t, k]
    barrier()
    _project(layer.down, hidden_TF, _floats(step.x, T, step.D), 1, thread, threads)


@compiled
def _embed(step):
    ids = carray(pointer(step.ids, np.int64(0)), (step.T,))
    x_TD = _floats(step.x, step.T, step.D)
    for t in range(step.T):
        read(step.embedding, step.code, ids[t] * step.D, x_TD[t])


@cache
def step_region() -> int:
    """Return the address of the function that each OpenMP thread runs for a step."""
    stamp, size = STAMP, LAYER.itemsize  # the stamp is a part of the key on disk

    @entry(cfunc, types.void(types.int64))
    def run(step_at):
        assert stamp
        step, thread, threads = carray(_steps_at(step_at), (1,))[0], int(thread_num()), int(num_threads())
        T, x_TD = step.T, _floats(step.x, step.T, step.D)
        layers = carray(_layers_at(step.layers), (step.count,))
        if thread == 0:
            _embed(step)
        barrier()
        for index in range(step.count):
            layer = layers[index]
            normed_TD = _normed(step, layer.norm)
            q_TR, mixed_TR = _floats(step.q, T, step.H * step.d), _floats(step.mixed, T, step.H * step.d)
            _project(layer.q, normed_TD, q_TR, 0, thread, threads)
            _project(layer.k, normed_TD, _floats(step.k, T, step.KV * step.d), 0, thread, threads)
            _project(layer.v, normed_TD, _floats(step.v, T, step.KV * step.d), 0, thread, threads)
            barrier()
            call(layer.attend, (step_at, step.layers + size * index, thread, threads, 0, 0, 0))
            barrier()
            _project(layer.o, mixed_TR, x_TD, 1, thread, threads)
            barrier()
            if layer.ffn != 0:
                call(layer.ffn_run, (layer.ffn,))
            else:
                _dense(step, layer, thread, threads)
            barrier()
        _project(step.head, _normed(step, step.norm), _floats(step.logits, T, step.V), 0, thread, threads)

    return run.address
