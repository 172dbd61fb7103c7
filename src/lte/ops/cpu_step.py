"""A decoding step of a Llama-like model on a CPU in one call: all layers, on torch's own OpenMP threads.

The kernels are in :mod:`lte.ops.cpu_kernels.step`. Arithmetic is in fp32, and weights are read as they are stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lte.ops import cpu
from lte.ops.cpu_kernels.ffn import ACTS, JOB, region
from lte.ops.cpu_kernels.numbers import CODES, FLOATS
from lte.ops.cpu_kernels.step import LAYER, LINEAR, STEP, attention, projection, step_region
from lte.ops.weights import Activation, Affine, FFNWeights

MOST_TOKENS = 24
"""The largest batch. For more, torch's matrix products are faster."""


@dataclass(frozen=True)
class DenseFFN:
    """``down(act(gate(x)) * up(x))``. Shapes: gate and up ``[F, D]``, down ``[D, F]``."""

    gate: Affine
    up: Affine
    down: Affine
    act: Activation


@dataclass(frozen=True)
class Layer:
    """One layer: RMSNorm, attention with rotated queries and keys, RMSNorm, an FFN; both are added to their input.

    Attributes:
        norm, ffn_norm: ``[D]``.
        q, k, v, o: ``[H * d, D]``, ``[KV * d, D]`` twice, ``[D, H * d]``.
        q_norm, k_norm: ``[d]``, RMSNorm of each head; None for none.
        keys, values: ``[B, KV, S, d]``. A step writes one slot of each text.
        window: number of slots that a token sees, its own included; None for all.
    """

    norm: Tensor
    q: Affine
    k: Affine
    v: Affine
    o: Affine
    q_norm: Tensor | None
    k_norm: Tensor | None
    ffn_norm: Tensor
    ffn: FFNWeights | DenseFFN
    keys: Tensor
    values: Tensor
    window: int | None


@dataclass(frozen=True)
class Stack:
    """A whole model: token embedding ``[V, D]``, layers, the last norm, the head ``[V, D]``.

    Attributes:
        cos, sin: fp32 ``[S, d]``, for each slot.
        eps: of all norms.
        scaling: of attention's scores.
    """

    embedding: Tensor
    layers: Sequence[Layer]
    norm: Tensor
    head: Affine
    cos: Tensor
    sin: Tensor
    eps: float
    scaling: float


def refuses(stack: Stack) -> str | None:
    """Return why :class:`Step` cannot compute this, in one line; None if it can."""
    if cpu.openmp() is None:
        return "torch has no OpenMP with GNU's interface here"
    first, dtype = stack.layers[0], stack.embedding.dtype
    floats = [stack.embedding, stack.norm]
    projections = [stack.head]
    for layer in stack.layers:
        floats += [layer.norm, layer.ffn_norm, layer.keys, layer.values]
        floats += [one for one in (layer.q_norm, layer.k_norm) if one is not None]
        projections += [layer.q, layer.k, layer.v, layer.o]
        if isinstance(layer.ffn, DenseFFN):
            projections += [layer.ffn.gate, layer.ffn.up, layer.ffn.down]
        elif (reason := cpu.refuses(torch.empty(1, stack.embedding.shape[1]), layer.ffn)) is not None:
            return reason
    if dtype not in FLOATS or any(one.dtype != dtype for one in floats):
        return "embedding, norms and cache are not of one dtype of floats"
    if first.keys.shape[0] > MOST_TOKENS:
        return f"a batch of {first.keys.shape[0]} is above {MOST_TOKENS}"
    tensors = [one for each in projections for one in (each.matrix.rows, each.matrix.scales, each.bias)]
    if not all(one is None or (one.is_contiguous() and one.dtype in CODES) for one in (*floats, *tensors)):
        return "a weight is not contiguous, or of another dtype than the CPU kernels take"
    if any(each.matrix.shape[0] % 4 or each.matrix.shape[1] % 2 for each in projections):
        return "a projection has a number of rows that is no multiple of 4, or an odd width"
    if any(_width(layer.ffn) != _width(first.ffn) or layer.ffn.act != first.ffn.act for layer in stack.layers):
        return "FFNs differ in width or activation"
    return None


class Step:
    """The step of one model for one batch, with the memory that it needs.

    Args:
        stack: one that :func:`refuses` does not refuse. Its tensors are read at each call.
        slot_B: int64 ``[B]``, the slot of each text's token. The caller changes it.
    """

    def __init__(self, stack: Stack, slot_B: Tensor) -> None:
        self._kept: list[Any] = [stack, slot_B]
        first, D = stack.layers[0], stack.embedding.shape[1]
        T, KV, S, d = first.keys.shape
        H, F = first.q.matrix.shape[0] // d, _width(first.ffn)
        self._threads = torch.get_num_threads()
        self._logits = self._room(T, stack.head.matrix.shape[0])
        x_TD = self._room(T, D)
        layers = np.zeros(len(stack.layers), LAYER)
        self._step = np.zeros(1, STEP)
        for name, value in {
            **{"layers": layers.ctypes.data, "count": len(layers), "code": CODES[stack.embedding.dtype]},
            **{"T": T, "D": D, "H": H, "KV": KV, "d": d, "S": S, "V": self._logits.shape[1]},
            **{"F": F, "act": ACTS[first.ffn.act], "slots": _at(slot_B), "cos": _at(stack.cos), "sin": _at(stack.sin)},
            **{"embedding": _at(stack.embedding), "norm": _at(stack.norm), "head": self._linear(stack.head)},
            **{"x": _at(x_TD), "logits": _at(self._logits), "mixed": _at(self._room(T, H * d))},
            **{"q": _at(self._room(T, H * d)), "k": _at(self._room(T, KV * d)), "v": _at(self._room(T, KV * d))},
            **{"hidden": _at(self._room(T, F)), "gate": _at(self._room(T, F))},
            **{"eps": stack.eps, "scaling": stack.scaling},
        }.items():
            self._step[name] = value
        self._kept.append(layers)
        for packed, layer in zip(layers, stack.layers, strict=True):
            self._pack(packed, layer, x_TD, stack.eps)
        self._run, self._start = step_region(), cpu.openmp()

    def __call__(self, token_B: Tensor) -> Tensor:
        """Return the logits of the next token, fp32 ``[B, V]``. The next call writes over them.

        Args:
            token_B: int64, each text's last token.
        """
        assert self._start is not None
        self._step["ids"] = token_B.data_ptr()
        self._start(self._run, self._step.ctypes.data, self._threads, 0)
        return self._logits

    def _pack(self, packed: Any, layer: Layer, x_TD: Tensor, eps: float) -> None:
        for name in ("q", "k", "v", "o"):
            packed[name] = self._linear(getattr(layer, name))
        for name in ("norm", "ffn_norm", "q_norm", "k_norm", "keys", "values"):
            packed[name] = _at(getattr(layer, name))
        packed["window"], packed["attend"] = layer.window or 0, attention(layer.keys.dtype)
        ffn = layer.ffn
        if isinstance(ffn, DenseFFN):
            for name in ("gate", "up", "down"):
                packed[name] = self._linear(getattr(ffn, name))
            return
        room = cpu.Room(x_TD, ffn, self._threads)
        job = cpu.pack_job(*cpu.job_values(x_TD, x_TD, ffn, room, norm=layer.ffn_norm, eps=eps))
        packed["ffn"] = self._keep(np.frombuffer(bytearray(job), JOB)).ctypes.data
        packed["ffn_run"] = region(ffn.up.matrix.rows.dtype, ffn.router.matrix.rows.dtype)
        self._kept.append(room)

    def _linear(self, affine: Affine) -> int:
        """Return the address of a projection's record."""
        matrix, bias = affine.matrix, affine.bias
        record = self._keep(np.zeros(1, LINEAR))
        record[0] = (
            projection(matrix.rows.dtype),
            *(_at(matrix.rows), _at(matrix.scales), 0 if matrix.scales is None else CODES[matrix.scales.dtype]),
            *(_at(bias), 0 if bias is None else CODES[bias.dtype], *matrix.shape),
        )
        return record.ctypes.data

    def _keep(self, array: Any) -> Any:
        self._kept.append(array)
        return array

    def _room(self, *shape: int) -> Tensor:
        self._kept.append(made := torch.zeros(shape))
        return made


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _width(ffn: FFNWeights | DenseFFN) -> int:
    return ffn.d_ff if isinstance(ffn, FFNWeights) else ffn.up.matrix.shape[0]
