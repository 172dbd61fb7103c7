"""``lte bench decode``: a whole model, dense against sparse, decoding as ``generate`` does."""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import tyro
from transformers import PreTrainedModel

from lte.bench import llama_cpp
from lte.bench.decode import DecodeGrid, be_dense_, bench_decode, dense_models, random_model
from lte.bench.shapes import shape_config
from lte.bench.timing import memory_bandwidth
from lte.cli.bench_report import (
    BackendOption,
    BenchOutput,
    BenchReport,
    NumericDtype,
    ShapeName,
    check_positive,
    check_sparsities,
    resolve_backend,
)
from lte.cli.console import err
from lte.cli.main import parse
from lte.cli.options import DeviceOptions, open_model
from lte.cli.switches import switches
from lte.evaluation.result_row import ResultRow
from lte.methods.lte import LTEConfig
from lte.ops.quantise import Quantised
from lte.surgery.conversion import is_sparse
from lte.surgery.convert import sparsify_
from lte.surgery.cost import meta_model

_FEWEST_TOKENS = 8  # a step runs four times before its CUDA graph exists


@dataclass
class Decode:
    shape: ShapeName = "llama2-7b"
    model: str | None = None
    """In place of --shape: a local folder, a hub id, or a .gguf file; dense (gets random routers), trained sparse, or
    with TEAL's thresholds."""
    sparsity: Annotated[
        tuple[float, ...], tyro.conf.arg(help="Sparsities of the routers; not with a trained model.")
    ] = ()
    attention_sparsity: float = 0.0
    """Share of the inputs of attention's projections that thresholds leave out; not with a trained model."""
    batch: Annotated[tuple[int, ...], tyro.conf.arg(help="Texts at once.")] = (1,)
    prompt_tokens: int = 128
    """Length of the prompt."""
    new_tokens: int = 256
    """Tokens to decode after it."""
    dtype: NumericDtype = "bfloat16"
    """Dtype of the weights. On a CPU dense is timed in fp32 and bf16, and the faster one counts."""
    backend: BackendOption = "auto"
    """auto: as a model chooses; device: the backend for this device, at any number of tokens."""
    weights: Quantised | None = None
    """int8 or int4: quantise sparse, not dense. Parity is then with sparse as it is quantised."""
    expert_size: int = 32
    """Neurons of an expert, with random routers."""
    repeats: int = 3
    """Texts decoded by each model, in turn; medians are over all their tokens."""
    compile: bool | None = None
    """Whether the step is compiled by torch.compile, dense and sparse; the default is yes on CUDA, no on a CPU."""
    tune: bool | None = None
    """Whether the step is also tuned (coordinate descent), dense and sparse. The default is that of --compile."""
    attention: Literal["sdpa", "eager"] | None = None
    """The attention of transformers that both models use. The default is the model's own. Try which one is the fastest
    for one query."""
    generate: bool = False
    """Also time model.generate() without options."""
    peers: bool | None = None
    """Also time llama.cpp (BF16, Q8_0 and Q4_0) with the dense weights, at batch 1. The default is yes on a CPU, if the
    packages of lte[peers] are there."""
    seed: int = 0
    """Seed of weights, routers and prompts."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    trust_remote_code: bool = False
    """Run code that comes with the model, if there is any. Read the code first."""
    to: BenchOutput = field(default_factory=BenchOutput)


def main(argv: Sequence[str]) -> int:
    options: Decode = parse(Decode, "bench decode", switches(argv, Decode))
    check_positive("batch", options.batch)
    check_positive("prompt_tokens and repeats", [options.prompt_tokens, options.repeats])
    if options.new_tokens < _FEWEST_TOKENS:
        raise ValueError(f"new_tokens is {options.new_tokens}, but it is at least {_FEWEST_TOKENS}")
    if options.sparsity:
        check_sparsities(options.sparsity)
    options.to.check()
    device, _ = DeviceOptions(options.device).resolve()
    backend = resolve_backend(options.backend, device)
    gb_per_s = memory_bandwidth(device)
    model, trained = _model(options, device)
    if trained and (options.sparsity or options.attention_sparsity):
        raise ValueError(
            f"{options.model} has trained routers or thresholds, which set its sparsity: leave --sparsity and "
            "--attention-sparsity out"
        )
    sparsities = () if trained else options.sparsity or (0.0, 0.5, 0.8, 0.9)
    sparse = copy.deepcopy(model)
    if trained:
        be_dense_(model)
    else:  # the grouping of random or new routers does not change the time
        config = LTEConfig(
            expert_size=options.expert_size,
            grouping="random",
            seed=options.seed,
            attention_sparsity=options.attention_sparsity,
        )
        sparsify_(sparse, config)
    err.print(f"memory {gb_per_s:,.0f} GB/s, backend {backend}; building and compiling take a while", markup=False)
    compiles = device.type == "cuda" if options.compile is None else options.compile
    grid = DecodeGrid(
        name=options.model or options.shape,
        sparsities=sparsities,
        attention_sparsity=options.attention_sparsity or None,
        batches=options.batch,
        backend=backend,
        weights=options.weights,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        compile=compiles,
        tune=compiles and device.type == "cuda" if options.tune is None else options.tune,
        generate=options.generate,
        attention=options.attention,
        peers=_peers(options.peers, device),
        bandwidth=gb_per_s,
        seed=options.seed,
    )
    report = BenchReport("decode", argv, device, gb_per_s, options.to.output)
    report.collect(bench_decode(dense_models(model), sparse, grid), _line)
    code = report.finish(f"decoding {grid.name}", _COLUMNS, options.to.json)
    if options.to.plot is not None:
        report.plot(options.to.plot, "batch", f"decoding {grid.name}")
    return code


def _peers(asked: bool | None, device: torch.device) -> tuple[str, ...]:
    if asked and device.type != "cpu":
        raise ValueError(f"llama.cpp is timed on a CPU here, not on {device.type}: leave --peers out")
    if asked and not llama_cpp.is_there():
        raise ValueError("llama.cpp is not installed: pip install 'lte[peers]'")
    return llama_cpp.FORMS if device.type == "cpu" and asked is not False and llama_cpp.is_there() else ()


def _model(options: Decode, device: torch.device) -> tuple[PreTrainedModel, bool]:
    """The model, and whether its routers or thresholds are trained."""
    dtype = getattr(torch, options.dtype)
    if options.model is None:
        if device.type == "cpu":
            _check_memory(options.shape, dtype)
        return random_model(shape_config(options.shape), dtype, device, options.seed), False
    model = open_model(options.model, "causal", device, dtype, options.trust_remote_code)
    return model, is_sparse(model.config)


def _check_memory(shape: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless the dense and the sparse model fit into memory.

    A system without memory ends a process without a message.
    """
    weights = sum(one.numel() for one in meta_model(shape_config(shape)).parameters())
    needed, free = 2 * weights * dtype.itemsize, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.9 * free:
        raise ValueError(
            f"two models of {shape} take {needed / 1e9:.0f} GB, and this machine has {free / 1e9:.0f} GB: "
            "give a smaller --shape, e.g. smollm2-135m"
        )


_COLUMNS: dict[str, Callable[[ResultRow], str]] = {
    "batch": lambda r: str(r["batch"]),
    "sparsity": lambda r: f"{r['sparsity']:.1%}",
    "attention": lambda r: f"{r['attention_sparsity']:.1%}",
    "union": lambda r: f"{r['union_sparsity']:.1%}",
    "dense ms/token": lambda r: f"{r['dense_ms']:.3f}",
    "lte ms/token": lambda r: f"{r['lte_ms']:.3f}",
    "speed-up": lambda r: f"{r['speedup']:.2f}",
    "ideal": lambda r: f"{r['ideal_speedup']:.2f}",
    "prefill ms": lambda r: f"{r['dense_prefill_ms']:.1f} > {r['lte_prefill_ms']:.1f}",
    "total s": lambda r: f"{r['dense_total_s']:.2f} > {r['lte_total_s']:.2f}",
    "tok/s": lambda r: f"{r['dense_tokens_per_s']:.1f} > {r['lte_tokens_per_s']:.1f}",
    "llama.cpp tok/s": lambda r: " ".join(
        f"{form} {1e3 / one['step_ms']:.1f}" for form, one in r.get("llama_cpp", {}).items()
    ),
    "of memory": lambda r: f"{r['share_of_bandwidth']:.0%}",
    "backend": lambda r: r["backend"],
}


def _line(row: ResultRow) -> str:
    text = "  ".join(f"{name} {cell(row)}" for name, cell in _COLUMNS.items())
    return f"{text}  (dense {row['dense_by']}, lte {row['lte_by']}; prepared in {row['prepare_s']:.0f} s)"
