"""``lte bench``: dense against sparse in seconds, of one FFN, of decoding, of a training step."""

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from lte.cli.bench_report import Report, Row
from lte.cli.console import err, out
from lte.cli.main import UsageError, parse
from lte.cli.options import DeviceOptions
from lte.evaluation.plots import plot_speed
from lte.inference.bench_ffn import FFNGrid, bench_ffn, crossovers
from lte.inference.shapes import SHAPES, ffn_size, shape_config
from lte.inference.timing import memory_bandwidth
from lte.ops.sparse_ffn import BackendName, load_backend
from lte.surgery.loading import load_config

Shape = Annotated[str, tyro.conf.arg(help=f"Random weights of a published size: {', '.join(SHAPES)}.")]
Sparsities = Annotated[tuple[float, ...], tyro.conf.arg(help="Sparsities to ask of the routers; 0 is every expert.")]
NumericDtype = Literal["float32", "bfloat16", "float16"]


@dataclass
class BenchOutput:
    """Where results go."""

    json: bool = False
    """Print one JSON object on the last line."""
    output: Annotated[str | None, tyro.conf.arg(aliases=("-o",))] = None
    """Append that line to this .jsonl file."""
    plot: str | None = None
    """Write a picture to this .png file."""


@dataclass
class FFN:
    shape: Shape = "llama2-7b"
    model: str | None = None
    """In place of --shape, the FFN size of this model: a local folder, a hub id, or a .gguf file."""
    sparsity: Sparsities = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    tokens: Annotated[tuple[int, ...], tyro.conf.arg(help="Tokens at once.")] = (1, 2, 4, 8, 16, 32, 64, 512)
    dtype: Annotated[
        tuple[NumericDtype, ...], tyro.conf.arg(help="Of the weights. None: bfloat16; on a CPU also fp32.")
    ] = ()
    backend: Literal["device", "auto", "reference", "triton", "cpu"] = "device"
    """device: the one made for it, at any number of tokens; auto: as a model would choose."""
    expert_size: int = 32
    """Neurons an expert."""
    repeats: int = 20
    """Samples of which the median is taken."""
    seconds: float = 3.0
    """On a CPU, at most so long a row (but three samples)."""
    compile: bool | None = None
    """Whether dense may be compiled by torch.compile; the default is yes on CUDA, no on a CPU."""
    max_autotune: bool = False
    """Also time dense compiled with max-autotune, which takes long to compile."""
    seed: int = 0
    """Of weights and inputs."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    to: BenchOutput = field(default_factory=BenchOutput)


def main(argv: Sequence[str]) -> int:
    commands: dict[str, Callable[[Sequence[str]], int]] = {"ffn": ffn}
    if not argv or argv[0] in ("-h", "--help"):
        out.print("usage: lte bench ffn [OPTIONS]\n")
        out.print("  ffn     one FFN over sparsity and number of tokens, and up to where sparse pays")
        return 0
    if argv[0] not in commands:
        raise UsageError(f"lte bench has no {argv[0]!r}: use one of {', '.join(commands)}")
    return commands[argv[0]](argv)


def ffn(argv: Sequence[str]) -> int:
    options: FFN = parse(FFN, "bench ffn", argv[1:])
    check_sparsities(options.sparsity)
    check_positive("tokens", options.tokens)
    device, _ = DeviceOptions(options.device).resolve()
    size = ffn_size(shape_config(options.shape) if options.model is None else load_config(options.model))
    if options.expert_size < 1 or size.d_ff % options.expert_size:
        raise ValueError(f"expert_size is {options.expert_size}, but it must divide the {size.d_ff} neurons")
    backend = resolve_backend(options.backend, device)
    dtypes = options.dtype or (("float32", "bfloat16") if device.type == "cpu" else ("bfloat16",))
    gb_per_s = memory_bandwidth(device)
    err.print(f"{size}, memory {gb_per_s:,.0f} GB/s, backend {backend}", markup=False)
    grid = FFNGrid(
        options.model or options.shape,
        size,
        options.sparsity,
        options.tokens,
        [getattr(torch, name) for name in dtypes],
        device,
        backend,
        options.expert_size,
        options.repeats,
        options.seconds,
        device.type == "cuda" if options.compile is None else options.compile,
        options.max_autotune,
        gb_per_s,
        options.seed,
    )
    report = Report(shlex.join(["lte", "bench", *argv]), device, gb_per_s, options.to.output)
    report.collect(bench_ffn(grid), _ffn_line)
    report.values["crossovers"] = found = crossovers(report.rows)
    for dtype, by_sparsity in found.items():
        text = ", ".join(f"{tokens} at {float(sparsity):.0%}" for sparsity, tokens in by_sparsity.items())
        out.print(f"{dtype}: sparse is at most 3 % slower than dense up to so many tokens: {text}")
    if options.to.plot is not None:
        plot_speed(report.rows, "tokens", Path(options.to.plot), f"FFN of {grid.name}, {report.values['device']}")
    code = report.finish(f"one FFN of {grid.name}, {report.values['device']}", _FFN_COLUMNS, options.to.json)
    return code


_FFN_COLUMNS: dict[str, Callable[[Row], str]] = {
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


def _ffn_line(row: Row) -> str:
    return "  ".join(f"{name} {cell(row)}" for name, cell in _FFN_COLUMNS.items())


def check_sparsities(given: Sequence[float]) -> None:
    if not given or not all(0 <= one <= 1 and math.isfinite(one) for one in given):
        raise ValueError(f"sparsity is {given}, but each is a fraction between 0 (dense) and 1")


def check_positive(name: str, given: Sequence[int]) -> None:
    if not given or min(given) < 1:
        raise ValueError(f"{name} is {given}, but each is at least 1")


def resolve_backend(name: str, device: torch.device) -> BackendName:
    """The backend to ask for by name.

    Raises:
        ValueError: it is not installed.
    """
    backend = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "reference") if name == "device" else name
    if backend != "auto":
        try:
            load_backend(backend)
        except ImportError as error:
            raise ValueError(f"backend {backend!r} cannot run here: {error}; pip install 'lte[{backend}]'") from error
    return backend  # pyright: ignore[reportReturnType]
