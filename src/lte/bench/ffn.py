"""One FFN, dense against sparse: time, bytes and bandwidth over sparsity and number of tokens."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lte.bench import synthetic
from lte.bench.parity import parity
from lte.bench.shapes import FFNSize
from lte.bench.timing import available_memory, cache_bytes, in_turn
from lte.inference.generate import error_line
from lte.inference.graphs import Action, capture
from lte.ops import reference
from lte.ops.quantise import Quantised, quantise_ffn
from lte.ops.sparse_ffn import BackendName, choose, sparse_ffn
from lte.ops.weights import FFNWeights

logger = logging.getLogger(__name__)

_MOST_COPIES = 256
_SAMPLE_TOKENS = 1024

DenseLayer = tuple[Tensor | None, Tensor, Tensor]
"""gate ``[F, D]``, up ``[F, D]``, down ``[D, F]``: as ``nn.Linear`` keeps them."""


@dataclass(frozen=True)
class FFNGrid:
    """The cases to time. ``sparsities`` are the ones asked for, and rows have the measured ones."""

    name: str
    size: FFNSize
    sparsities: Sequence[float]
    tokens: Sequence[int]
    dtypes: Sequence[torch.dtype]
    device: torch.device
    backend: BackendName
    weights: Quantised | None = None
    """How sparse is quantised, with routers in int8. Dense is not quantised."""
    expert_size: int = 32
    compensation_rank: int = 0
    repeats: int = 20
    seconds: float = 3.0
    compile: bool = True
    max_autotune: bool = False
    bandwidth: float = float("nan")
    """GB/s of memory, measured in the same run."""
    seed: int = 0


@dataclass(frozen=True)
class Layers:
    """Copies of the FFN, used one after the other so that none stays in cache. Dense copies are by dtype."""

    sparse: list[FFNWeights]
    dense: dict[torch.dtype, list[DenseLayer]]
    samples: list[Tensor]
    """For each copy, the logits of random tokens, without bias."""


@torch.no_grad()
def bench_ffn(grid: FFNGrid) -> Iterator[dict[str, Any]]:
    """Time the grid, row by row. A row that fails, or has no parity, has ``error`` and no times."""
    for dtype in grid.dtypes:
        layers = make_layers(grid, dtype)
        for tokens in grid.tokens:
            yield from _bench_tokens(grid, dtype, tokens, layers)


def _bench_tokens(grid: FFNGrid, dtype: torch.dtype, tokens: int, layers: Layers) -> Iterator[dict[str, Any]]:
    generator = torch.Generator(grid.device).manual_seed(grid.seed + tokens)
    shape = (len(layers.sparse), tokens, grid.size.d_model)
    x_LTD = torch.empty(shape, dtype=dtype, device=grid.device).normal_(generator=generator)
    common = {"shape": grid.name, "dtype": _name(dtype), "tokens": tokens, "rank": grid.compensation_rank}
    if grid.weights is not None:
        common["weights"] = grid.weights
    try:
        used = choose(x_LTD[0], layers.sparse[0], grid.backend)
        runs = _dense_runs(grid, layers, x_LTD)
        runs["lte"] = _prepared(grid, lambda: _run_sparse(x_LTD, layers.sparse, grid.backend))
    except Exception as error:  # if a kernel does not compile, these rows are lost, not the table
        for asked in grid.sparsities:
            yield {**common, "sparsity_asked": asked, "backend": grid.backend, "error": error_line(error)}
        return
    for asked in grid.sparsities:
        row = {**common, "sparsity_asked": asked, "backend": used}
        try:
            set_biases_(grid, layers, x_LTD, asked)
            wrong = parity(x_LTD, layers.sparse, grid.backend)
            if wrong is not None:
                yield {**row, "error": wrong}
                continue
            row |= _costs(grid, dtype, layers, x_LTD)
            yield {**row, **_timed(grid, dtype, layers, runs, row)}
        except Exception as error:
            yield {**row, "error": error_line(error)}


def _timed(
    grid: FFNGrid, dtype: torch.dtype, layers: Layers, runs: dict[str, Action], row: dict[str, Any]
) -> dict[str, Any]:
    seconds = in_turn(runs, grid.device, grid.repeats, grid.seconds)
    microseconds = {name: 1e6 * value / len(layers.sparse) for name, value in seconds.items()}
    lte = microseconds.pop("lte")
    fastest = min(microseconds, key=microseconds.__getitem__)
    dense_bytes = row["dense_bytes"] * getattr(torch, fastest.split()[1]).itemsize // dtype.itemsize
    gb_per_s = row["bytes"] / lte / 1e3
    return {
        "dense_us": microseconds[fastest],
        "lte_us": lte,
        "speedup": microseconds[fastest] / lte,
        "ideal_speedup": dense_bytes / row["bytes"],
        "dense_bytes": dense_bytes,
        "gb_per_s": gb_per_s,
        "share_of_bandwidth": gb_per_s / grid.bandwidth,
        "dense_by": fastest,
        "dense_us_all": microseconds,
        "copies": len(layers.sparse),
    }


def make_layers(grid: FFNGrid, dtype: torch.dtype) -> Layers:
    """Return so many copies that the active weights of one round are four times the size of the cache."""
    on_cpu = grid.device.type == "cpu"
    dense_dtypes = [torch.float32, torch.bfloat16] if on_cpu else [dtype]
    count = grid.size.d_ff * grid.size.weights_per_neuron
    experts = grid.size.d_ff // grid.expert_size
    beside = grid.size.d_model * (experts + 2 * grid.compensation_rank)  # of router and compensation
    read = (count * (1 - max(grid.sparsities)) + beside) * dtype.itemsize
    room = available_memory(grid.device) // 2
    one = (count + beside) * dtype.itemsize + count * sum(dense.itemsize for dense in dense_dtypes)
    copies = max(1, min(_MOST_COPIES, -(-4 * cache_bytes(grid.device) // int(read)) + 1, room // one))
    generator = torch.Generator(grid.device).manual_seed(grid.seed)
    made = Layers([], {dense: [] for dense in dense_dtypes}, [])
    for _ in range(copies):
        weights = synthetic.random_ffn(
            grid.size, grid.expert_size, dtype, grid.device, generator, grid.compensation_rank
        )
        made.sparse.append(weights if grid.weights is None else quantise_ffn(weights, grid.weights))
        for dense, layers in made.dense.items():
            gate = None if weights.gate is None else weights.gate.matrix.floats(dense)
            up, down = weights.up.matrix.floats(dense), weights.down.matrix.floats(dense).T
            layers.append((gate, up, down.contiguous()))
        x_TD = torch.empty(_SAMPLE_TOKENS, grid.size.d_model, dtype=dtype, device=grid.device)
        made.samples.append(reference.logits(x_TD.normal_(generator=generator), made.sparse[-1].router))
    return made


def set_biases_(grid: FFNGrid, layers: Layers, x_LTD: Tensor, sparsity: float) -> None:
    """Set the routers, in place, so that the timed tokens have this sparsity. A captured graph needs that."""
    targets = synthetic.layer_targets(len(layers.sparse), sparsity, grid.seed)
    set_to, with_bias = [], []
    for index, (weights, x_TD) in enumerate(zip(layers.sparse, x_LTD, strict=True)):
        bias = synthetic.biases(layers.samples[index], targets[index], weights.router.threshold, grid.seed + index)
        set_to.append(bias)
        with_bias.append(reference.logits(x_TD, replace(weights.router, bias=bias)))
    shift = synthetic.shift_to(with_bias, sparsity, layers.sparse[0].router.threshold)
    for weights, bias in zip(layers.sparse, set_to, strict=True):
        assert weights.router.bias is not None
        weights.router.bias.copy_(bias + shift)


def crossovers(rows: Sequence[dict[str, Any]], slack: float = 0.03) -> dict[str, dict[str, int]]:
    """Return, by dtype and sparsity, the highest number of tokens at which sparse is not slower than dense.

    Sparse may be slower by ``slack``. The number is 0 if sparse is slower, or fails, at the lowest number of tokens.
    There is no entry if it was never timed.
    """
    found: dict[str, dict[str, int]] = {}
    still: set[tuple[str, float]] = {(row["dtype"], row["sparsity_asked"]) for row in rows if "lte_us" in row}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        key = row["dtype"], row["sparsity_asked"]
        if "lte_us" not in row:
            still.discard(key)
            continue
        by_sparsity = found.setdefault(key[0], {})
        by_sparsity.setdefault(str(key[1]), 0)
        if row["lte_us"] > (1 + slack) * row["dense_us"]:
            still.discard(key)
        elif key in still:
            by_sparsity[str(key[1])] = row["tokens"]
    return found


def _costs(grid: FFNGrid, dtype: torch.dtype, layers: Layers, x_LTD: Tensor) -> dict[str, Any]:
    """Return the measured sparsity, and the bytes that one FFN has to move at that sparsity."""
    active_LTE = torch.stack([reference.route(x, w.router) for x, w in zip(x_LTD, layers.sparse, strict=True)])
    union = float(active_LTE.any(1).float().mean())
    size, tokens = grid.size, x_LTD.shape[1]
    one = layers.sparse[0]
    neurons = sum(part.matrix.nbytes for part in (one.up, one.down, one.gate) if part is not None)
    router = one.router.matrix.nbytes + active_LTE.shape[-1] * dtype.itemsize
    compensation = grid.compensation_rank * (2 * size.d_model + 1) * dtype.itemsize
    ends = 2 * tokens * size.d_model * dtype.itemsize
    by_copy = 1 - active_LTE.float().mean((1, 2))
    return {
        "sparsity": 1 - float(active_LTE.float().mean()),
        "sparsity_range": [float(by_copy.min()), float(by_copy.max())],
        "union_sparsity": 1 - union,
        "bytes": round(neurons * union) + router + compensation + ends,
        "dense_bytes": size.d_ff * size.weights_per_neuron * dtype.itemsize + ends,
    }


def _dense_runs(grid: FFNGrid, layers: Layers, x_LTD: Tensor) -> dict[str, Action]:
    """Return every dense contender, ready to be timed, by its name and dtype."""
    runs: dict[str, Action] = {}
    variants: dict[str, Callable[..., Tensor]] = {"eager": _ffn(grid.size)}
    if grid.compile:
        torch._dynamo.reset()  # so that a new number of tokens is a new program and does not make sizes dynamic
        variants["compiled"] = torch.compile(_ffn(grid.size), dynamic=False)
        if x_LTD.shape[1] == 1 and grid.device.type == "cuda":  # torch's matrix-vector kernels instead of cuBLAS
            options: dict[str, Any] = {"coordinate_descent_tuning": True}
            variants["tuned"] = torch.compile(_ffn(grid.size), dynamic=False, options=options)
        if grid.max_autotune:
            variants["autotuned"] = torch.compile(_ffn(grid.size), dynamic=False, mode="max-autotune-no-cudagraphs")
    for dtype, dense in layers.dense.items():
        x = x_LTD.to(dtype)
        for name, ffn in variants.items():

            def run(ffn: Callable[..., Tensor] = ffn, x: Tensor = x, dense: list[DenseLayer] = dense) -> None:
                for x_TD, weights in zip(x, dense, strict=True):
                    ffn(x_TD, *weights)

            try:
                runs[f"{name} {_name(dtype)}"] = _prepared(grid, run)
            except Exception as error:
                if name == "eager":
                    raise
                logger.warning("dense %s not timed at %d tokens: %s", name, x_LTD.shape[1], error_line(error))
    return runs


def _ffn(size: FFNSize) -> Callable[..., Tensor]:
    linear = torch.nn.functional.linear

    def ffn(x_TD: Tensor, gate: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
        if gate is None:
            return linear(reference.activate(linear(x_TD, up), size.act), down)
        return linear(reference.activate(linear(x_TD, gate), size.act) * linear(x_TD, up), down)

    return ffn


def _run_sparse(x_LTD: Tensor, layers: list[FFNWeights], backend: BackendName) -> None:
    for x_TD, weights in zip(x_LTD, layers, strict=True):
        sparse_ffn(x_TD, weights, backend=backend)


def _prepared(grid: FFNGrid, run: Action) -> Action:
    if grid.device.type == "cuda":
        return capture(run)
    run()  # compiles, if it is a compiled one
    return run


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
