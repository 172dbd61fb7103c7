"""``sparse_ffn`` on CPU: the rows of active experts are read once, in fp32, bf16 or fp16. Arithmetic is in fp32.

The threads are those of torch's own OpenMP, if it is found. Idle OpenMP threads spin, so a second pool of threads would
compete for the cores. A call is one parallel region and takes about 3 us with its barriers on two cores.
"""

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from lte.ops.cpu_kernels import ACTS, CODES, JOB, JOB_INTEGERS, ROWS, TAGS, region, run_by_numba
from lte.ops.weights import FFNWeights

_BLOCK = 64  # tokens of a job: limits the threads' parts of the output, so that they stay in cache
_pack_job = struct.Struct(f"{len(JOB_INTEGERS)}qd").pack
_numba_threads = Lock()


def refuses(x_TD: Tensor, weights: FFNWeights) -> str | None:
    """Return why it cannot compute this, in one line; None if it can."""
    if x_TD.device.type != "cpu":
        return f"x is on {x_TD.device}"
    if weights.quantised:
        return "the CPU kernels take no quantised weights"
    for name, tensor in (("x", x_TD), *weights.named_tensors()):
        if tensor.dtype not in CODES:
            return f"{name} is {tensor.dtype}, but the CPU kernels take float32, bfloat16 and float16"
        if name != "x" and not tensor.is_contiguous():
            return f"{name} is not contiguous: call lte.optimize_ for an FFN, and contiguous() for other tensors"
    dtype, gate = weights.up.matrix.rows.dtype, weights.gate
    if weights.down.matrix.rows.dtype != dtype or (gate is not None and gate.matrix.rows.dtype != dtype):
        return "up, gate and down differ in dtype: cast them to one"
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


def _compute(x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None, out_TD: Tensor) -> None:
    (T, D), E = x_TD.shape, weights.num_experts
    threads = torch.get_num_threads()
    parts_size = threads * T * D
    z_size = T * weights.rank
    size = parts_size + z_size + T * E // 4 + 1  # parts and z in fp32, then the router's choice, in bytes
    scratch = torch.empty(size, dtype=torch.float32, device="cpu")
    parts = scratch.data_ptr()
    job = _pack_job(
        x_TD.data_ptr(),
        out_TD.data_ptr(),
        parts + 4 * (parts_size + z_size) if active_TE is None else active_TE.data_ptr(),
        parts,
        parts + 4 * parts_size,
        *[0 if tensor is None else tensor.data_ptr() for tensor in weights.tensors],
        *[0 if tensor is None else CODES[tensor.dtype] for tensor in weights.tensors],
        CODES[x_TD.dtype],
        active_TE is None,
        T,
        D,
        weights.d_ff,
        E,
        weights.rank,
        ACTS[weights.act],
        weights.router.threshold,
    )
    dtype, router_dtype = weights.up.matrix.rows.dtype, weights.router.matrix.rows.dtype
    openmp = _openmp()
    if openmp is not None:
        openmp(region(dtype, router_dtype), job, threads, 0)
        return
    with _numba_threads:
        run_by_numba(np.frombuffer(job, JOB), threads, TAGS[dtype], TAGS[router_dtype])


@cache
def _openmp() -> Callable[..., None] | None:
    """Return the function that starts a parallel region of torch's OpenMP, if it has GNU's interface; else None."""
    try:
        process = ctypes.CDLL(None)
        start, _ = process.GOMP_parallel, process.GOMP_barrier
    except (AttributeError, OSError, TypeError):  # no OpenMP, LLVM's on macOS, Windows
        return None
    start.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return start
