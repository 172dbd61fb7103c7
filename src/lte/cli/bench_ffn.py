"""``lte bench ffn``: one FFN over sparsity and number of tokens. It shows where sparse is faster on this machine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
import tyro

from lte.bench.ffn import FFNGrid, bench_ffn, crossovers
from lte.bench.shapes import ffn_size, shape_config
from lte.bench.timing import memory_bandwidth
from lte.cli.bench_report import (
    BackendOption,
    BenchOutput,
    BenchReport,
    NumericDtype,
    ShapeName,
    Sparsities,
    check_positive,
    check_sparsities,
    resolve_backend,
)
from lte.cli.console import err, out
from lte.cli.main import parse
from lte.cli.options import DeviceOptions
from lte.cli.switches import switches
from lte.evaluation.result_row import ResultRow
from lte.ops.quantise import Quantised
from lte.surgery.loading import load_config


@dataclass
class FFN:
    shape: ShapeName = "llama2-7b"
    model: str | None = None
    """Take the FFN size of this model in place of --shape: a local folder, a hub id, or a .gguf file."""
    sparsity: Sparsities = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    tokens: Annotated[tuple[int, ...], tyro.conf.arg(help="Tokens at once.")] = (1, 2, 4, 8, 16, 32, 64, 512)
    dtype: Annotated[
        tuple[NumericDtype, ...], tyro.conf.arg(help="Dtype of the weights. None: bfloat16, and on a CPU also fp32.")
    ] = ()
    backend: BackendOption = "device"
    """device: the backend for this device, at any number of tokens; auto: as a model chooses."""
    weights: Quantised | None = None
    """int8 or int4: quantise sparse, not dense."""
    expert_size: int = 32
    """Neurons of an expert."""
    compensation_rank: int = 0
    """Rank of the compensation for idle experts, which only sparse has; 0: none."""
    repeats: int = 20
    """Samples for the median."""
    seconds: float = 3.0
    """On a CPU, the most seconds for a row (with at least three samples)."""
    compile: bool | None = None
    """Whether dense may be compiled by torch.compile; the default is yes on CUDA, no on a CPU."""
    max_autotune: bool = False
    """Also time dense compiled with max-autotune. Its compilation takes long."""
    seed: int = 0
    """Seed of weights and inputs."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    to: BenchOutput = field(default_factory=BenchOutput)


def main(argv: Sequence[str]) -> int:
    options: FFN = parse(FFN, "bench ffn", switches(argv, FFN))
    check_sparsities(options.sparsity)
    check_positive("tokens", options.tokens)
    check_positive("repeats", [options.repeats])
    options.to.check()
    device, _ = DeviceOptions(options.device).resolve()
    size = ffn_size(shape_config(options.shape) if options.model is None else load_config(options.model))
    if options.expert_size < 1 or size.d_ff % options.expert_size:
        raise ValueError(f"expert_size is {options.expert_size}, but it must divide the {size.d_ff} neurons")
    if options.compensation_rank < 0:
        raise ValueError(f"compensation_rank is {options.compensation_rank}, but a rank is 0 (none) or more")
    backend = resolve_backend(options.backend, device)
    dtypes = options.dtype or (("float32", "bfloat16") if device.type == "cpu" else ("bfloat16",))
    gb_per_s = memory_bandwidth(device)
    err.print(f"{size}, memory {gb_per_s:,.0f} GB/s, backend {backend}", markup=False)
    grid = FFNGrid(
        name=options.model or options.shape,
        size=size,
        sparsities=options.sparsity,
        tokens=options.tokens,
        dtypes=[getattr(torch, name) for name in dtypes],
        device=device,
        backend=backend,
        weights=options.weights,
        expert_size=options.expert_size,
        compensation_rank=options.compensation_rank,
        repeats=options.repeats,
        seconds=options.seconds,
        compile=device.type == "cuda" if options.compile is None else options.compile,
        max_autotune=options.max_autotune,
        bandwidth=gb_per_s,
        seed=options.seed,
    )
    report = BenchReport("ffn", argv, device, gb_per_s, options.to.output)
    report.collect(bench_ffn(grid), _line)
    report.values["crossovers"] = found = crossovers(report.rows)
    for dtype, by_sparsity in found.items():
        text = ", ".join(f"{tokens} at {float(sparsity):.0%}" for sparsity, tokens in by_sparsity.items())
        out.print(f"{dtype}: sparse is at most 3 % slower than dense up to this number of tokens: {text}")
    code = report.finish(f"one FFN of {grid.name}", _COLUMNS, options.to.json)
    if options.to.plot is not None:
        report.plot(options.to.plot, "tokens", f"one FFN of {grid.name}")
    return code


_COLUMNS: dict[str, Callable[[ResultRow], str]] = {
    "dtype": lambda r: r["dtype"],
    "tokens": lambda r: str(r["tokens"]),
    "sparsity": lambda r: f"{r['sparsity']:.1%}",
    "union": lambda r: f"{r['union_sparsity']:.1%}",
    "dense us": lambda r: f"{r['dense_us']:.1f}",
    "lte us": lambda r: f"{r['lte_us']:.1f}",
    "speed-up": lambda r: f"{r['speedup']:.2f}",
    "ideal": lambda r: f"{r['ideal_speedup']:.2f}",
    "MB": lambda r: f"{r['bytes'] / 1e6:.1f}",
    "GB/s": lambda r: f"{r['gb_per_s']:.0f}",
    "of memory": lambda r: f"{r['share_of_bandwidth']:.0%}",
    "backend": lambda r: r["backend"],
}


def _line(row: ResultRow) -> str:
    return "  ".join(f"{name} {cell(row)}" for name, cell in _COLUMNS.items())
