"""``sparse_ffn`` on CPU: the rows of active experts are read once, as they are stored. Arithmetic is in fp32.

The threads are those of torch's own OpenMP, if it is found. Idle OpenMP threads spin, so a second pool of threads would
compete for the cores. A call is one parallel region and takes about 3 us with its barriers on two cores.
"""

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from lte.ops.cpu_kernels.ffn import ACTS, JOB, JOB_INTEGERS, ROWS, by_numba, region
from lte.ops.cpu_kernels.numbers import CODES, FLOATS, TAGS
from lte.ops.weights import FFNWeights

_BLOCK = 64  # tokens of a job: limits the threads' parts of the output, so that they stay in cache
pack_job = struct.Struct(f"{len(JOB_INTEGERS)}qdd").pack
_numba_threads = Lock()


def refuses(x_TD: Tensor, weights: FFNWeights) -> str | None:
    """Return why it cannot compute this, in one line; None if it can."""
    if x_TD.device.type != "cpu":
        return f"x is on {x_TD.device}"
    for name, tensor in (("x", x_TD), *weights.named_tensors()):
        if tensor.dtype not in (CODES if name.endswith("matrix.rows") else FLOATS):
            return f"{name} is {tensor.dtype}, but the CPU kernels take float32, bfloat16 and float16"
        if name != "x" and not tensor.is_contiguous():
            return f"{name} is not contiguous: call lte.optimize_ for an FFN, and contiguous() for other tensors"
    dtype, gate = weights.up.matrix.rows.dtype, weights.gate
    if weights.down.matrix.rows.dtype != dtype or (gate is not None and gate.matrix.rows.dtype != dtype):
        return "up, gate and down differ in dtype: cast them to one"
    if weights.router.matrix.bits == 4:
        return "the router is int4, but the CPU kernels take one of floats or int8"
    if weights.expert_size % ROWS:
        return f"experts have {weights.expert_size} neurons, but the CPU kernels take multiples of {ROWS}"
    return None


def pays(x_TD: Tensor, weights: FFNWeights) -> bool:
    """Return whether it is the fastest backend for this, by measured crossovers.

    They were measured with 576 x 1536 and 2048 x 8192, at 50 % sparsity, on a core with AVX-512 and its bf16 dot
    product. Each token had its own experts, so many tokens together needed all experts. In bf16 the reference is faster
    from a number between 24 and 64 tokens on. In fp32 it is not faster at 128 tokens. The reference must cast weights
    of another dtype than x's at each call.
    """
    half = x_TD.dtype == weights.up.matrix.rows.dtype != torch.float32
    return x_TD.shape[0] <= (24 if half else 128)


def sparse_ffn(x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None = None) -> Tensor:
    """As :func:`lte.ops.sparse_ffn.sparse_ffn`."""
    x_TD = x_TD.contiguous()
    active_TE = None if active_TE is None else active_TE.contiguous()
    out_TD = torch.empty_like(x_TD)
    if x_TD.shape[0] <= _BLOCK:
        _compute(x_TD, weights, active_TE, out_TD)
        return out_TD
    for start in range(0, x_TD.shape[0], _BLOCK):
        block = slice(start, start + _BLOCK)
        _compute(x_TD[block], weights, None if active_TE is None else active_TE[block], out_TD[block])
    return out_TD


@dataclass
class Room:
    """Memory of a call: in fp32 the threads' parts of the output and the compensation's inside; the router's choice."""

    parts: int
    z: int
    active: int
    kept: Tensor

    def __init__(self, x_TD: Tensor, weights: FFNWeights, threads: int) -> None:
        (T, D), E = x_TD.shape, weights.num_experts
        parts_size, z_size = threads * T * D, T * weights.rank
        self.kept = torch.empty(parts_size + z_size + T * E // 4 + 1, dtype=torch.float32, device="cpu")
        self.parts = self.kept.data_ptr()
        self.z = self.parts + 4 * parts_size
        self.active = self.z + 4 * z_size


def job_values(
    x_TD: Tensor,
    out_TD: Tensor,
    weights: FFNWeights,
    room: Room,
    active_TE: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[int | float, ...]:
    """Return the fields of a job: ``out = FFN(x)``, or with the weight of an RMSNorm ``out = x + FFN(norm(x))``."""
    T, D = x_TD.shape
    return (
        x_TD.data_ptr(),
        out_TD.data_ptr(),
        room.active if active_TE is None else active_TE.data_ptr(),
        room.parts,
        room.z,
        *[0 if tensor is None else tensor.data_ptr() for tensor in weights.tensors],
        *[0 if tensor is None else CODES[tensor.dtype] for tensor in weights.tensors],
        CODES[x_TD.dtype],
        active_TE is None,
        T,
        D,
        weights.d_ff,
        weights.num_experts,
        weights.rank,
        ACTS[weights.act],
        0 if norm is None else norm.data_ptr(),
        0 if norm is None else CODES[norm.dtype],
        eps,
        weights.router.threshold,
    )


def _compute(x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None, out_TD: Tensor) -> None:
    threads = torch.get_num_threads()
    room = Room(x_TD, weights, threads)
    job = pack_job(*job_values(x_TD, out_TD, weights, room, active_TE))
    dtype, router_dtype = weights.up.matrix.rows.dtype, weights.router.matrix.rows.dtype
    start = openmp()
    if start is not None:
        start(region(dtype, router_dtype), job, threads, 0)
        return
    with _numba_threads:
        by_numba()(np.frombuffer(job, JOB), threads, TAGS[dtype], TAGS[router_dtype])


@cache
def openmp() -> Callable[..., None] | None:
    """Return the function that starts a parallel region of torch's OpenMP, if it has GNU's interface; else None."""
    try:
        process = ctypes.CDLL(None)
        start, _ = process.GOMP_parallel, process.GOMP_barrier
    except (AttributeError, OSError, TypeError):  # no OpenMP, LLVM's on macOS, Windows
        return None
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return start
