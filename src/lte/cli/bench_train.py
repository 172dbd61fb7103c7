"""``lte bench train``: a step of LTE's soft stage against a dense step of the same model."""

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from transformers import PreTrainedModel

from lte.bench.decode import random_model
from lte.bench.shapes import shape_config
from lte.bench.train import StepTime, step_seconds
from lte.cli.bench_report import BenchOutput, BenchReport, ShapeName, check_positive
from lte.cli.console import err
from lte.cli.main import parse
from lte.cli.options import DeviceOptions, open_model
from lte.cli.switches import switches
from lte.data.batches import PackedBlocks
from lte.evaluation.result_row import ResultRow
from lte.inference.generate import error_line
from lte.methods.lte import LTEConfig
from lte.modules.sparse_ffn import Selecting
from lte.surgery.convert import install_routers_
from lte.surgery.loading import load_config
from lte.training.arguments import LTETrainingArguments

_WARMUP = 5
_SETTINGS = (
    *("dtype", "lora_rank", "optim", "optim_args", "optim_target_modules"),
    *("gradient_checkpointing", "loss_in_pieces"),
)
"""Options that a row has if they are not the usual ones."""

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"schedule": "default", "target_sparsity": 0.5},
    "default without distillation": {"schedule": "default", "target_sparsity": 0.5, "distillation_weight": 0.0},
    "paper": {"schedule": "paper", "eta": 0.5},
    "paper with distillation": {"schedule": "paper", "eta": 0.5, "distillation_weight": 0.9},
}


@dataclass
class BenchTrain:
    shape: ShapeName = "smollm2-135m"
    variant: tuple[str, ...] = tuple(VARIANTS)
    """The variants to time."""
    model: str | None = None
    """In place of --shape: a local folder, a hub id, or a .gguf file."""
    batch: int = 16
    """Rows of a step."""
    sequence_length: int = 1024
    """Tokens of a row."""
    steps: Annotated[int, tyro.conf.arg(help="Steps for the median, after some steps of warm-up.")] = 12
    bf16: bool | None = None
    """Autocast to bf16; the default is yes on CUDA, no on a CPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""
    lora_rank: int | None = None
    """Train adapters of this rank, in both runs (--lora-rank of lte train)."""
    optim: str = "adamw_torch_fused"
    """The optimizer of both runs, and --optim-args and --optim-target-modules for it."""
    optim_args: str | None = None
    optim_target_modules: str | None = None
    gradient_checkpointing: bool = False
    loss_in_pieces: bool = False
    """Logits of a few tokens at a time, in both runs."""
    compile: bool = False
    """Compile the dense and the sparse model (--torch-compile of lte train)."""
    graphs: bool = False
    """With --compile: run compiled code as CUDA graphs (--torch-compile-mode reduce-overhead)."""
    expert_size: int = 32
    """Neurons of an expert."""
    seed: int = 0
    """Seed of weights and data."""
    device: str = "auto"
    """auto, cpu, cuda."""
    trust_remote_code: bool = False
    """Run code that comes with the model, if there is any. Read the code first."""
    to: BenchOutput = field(default_factory=BenchOutput)


def main(argv: Sequence[str]) -> int:
    options: BenchTrain = parse(BenchTrain, "bench train", switches(argv, BenchTrain))
    check_positive("batch, sequence_length and steps", [options.batch, options.sequence_length, options.steps])
    if unknown := set(options.variant) - VARIANTS.keys():
        raise ValueError(f"variant is {', '.join(sorted(unknown))!r}, but there are: {'; '.join(VARIANTS)}")
    if options.graphs and not options.compile:
        raise ValueError("CUDA graphs need compiled code: give --compile too")
    if options.to.plot is not None:
        raise ValueError("there is no picture of training steps: leave --plot out")
    options.to.check()
    device, _ = DeviceOptions(options.device).resolve()
    if device.index is not None:
        raise ValueError(f"device is {options.device!r}, but training takes the first: set CUDA_VISIBLE_DEVICES")
    name = options.model or options.shape
    report = BenchReport("train", argv, device, None, options.to.output)
    err.print(
        f"{len(options.variant)} variants, each beside a dense run, {_WARMUP + options.steps} steps a run", markup=False
    )
    with tempfile.TemporaryDirectory() as folder:
        report.collect(_rows(options, name, device, folder), _line)
    return report.finish(f"a training step of {name}", _COLUMNS, options.to.json)


def _model(options: BenchTrain, device: torch.device) -> PreTrainedModel:
    """The sparse model that every run starts from. Its neurons are not grouped yet."""
    dtype = getattr(torch, options.dtype)
    if options.model is None:
        model = random_model(shape_config(options.shape), dtype, device, options.seed)
    else:
        model = open_model(options.model, "causal", device, dtype, options.trust_remote_code)
    if not any(isinstance(module, Selecting) for module in model.modules()):
        install_routers_(model, LTEConfig(expert_size=options.expert_size, seed=options.seed))
    return model


def _rows(options: BenchTrain, name: str, device: torch.device, folder: str) -> Iterator[ResultRow]:
    """A row a variant, its dense run just before it."""
    tokens = options.batch * options.sequence_length
    config = shape_config(options.shape) if options.model is None else load_config(options.model)
    vocabulary = min(config.get_text_config().vocab_size, 2**16)
    ids = (
        np.random.default_rng(options.seed)
        .integers(0, vocabulary, tokens * (_WARMUP + options.steps + 1))
        .astype(np.uint16)
    )
    dataset = PackedBlocks(ids, options.sequence_length)
    for variant in options.variant:
        row: ResultRow = {"shape": name, "variant": variant, "batch": options.batch}
        row |= {
            "sequence_length": options.sequence_length,
            "bf16": _bf16(options, device),
            "compiled": options.compile,
            "graphs": options.graphs,
            **{one: value for one in _SETTINGS if (value := getattr(options, one)) != getattr(BenchTrain, one)},
        }
        try:
            made, dense_memory = _run(options, device, folder, dataset, {"schedule": "dense"})
            dense = made.step
            made, lte_memory = _run(options, device, folder, dataset, VARIANTS[variant])
            lte = made.step
        except Exception as error:  # out of memory with a teacher, say; the other variants may fit
            yield {**row, "error": error_line(error)}
            continue
        row |= {"dense_ms": 1e3 * dense, "lte_ms": 1e3 * lte, "ratio": lte / dense}
        row |= {"dense_tokens_per_s": tokens / dense, "lte_tokens_per_s": tokens / lte}
        row |= {"begin_s": made.begin, "begin_steps": made.begin / lte}
        yield {**row, "dense_memory_gb": dense_memory, "lte_memory_gb": lte_memory}


def _run(
    options: BenchTrain, device: torch.device, folder: str, dataset: PackedBlocks, settings: dict[str, Any]
) -> tuple[StepTime, float | None]:
    """The times of a run, and on CUDA the most memory that was allocated, in GB."""
    args = LTETrainingArguments(
        folder,
        **{"dense_fraction": 0.0, "hard_fraction": 0.0, **settings},
        max_steps=_WARMUP + options.steps + 1,
        per_device_train_batch_size=options.batch,
        learning_rate=1e-5,
        optim=options.optim,
        optim_args=options.optim_args,
        optim_target_modules=options.optim_target_modules,
        lora_rank=options.lora_rank,
        gradient_checkpointing=options.gradient_checkpointing or None,
        loss_in_pieces=options.loss_in_pieces,
        bf16=_bf16(options, device),
        torch_compile=options.compile,
        torch_compile_mode="reduce-overhead" if options.graphs else None,
        use_cpu=device.type == "cpu",
        save_strategy="no",
        report_to="none",
        logging_steps=10**6,
        disable_tqdm=True,
        seed=options.seed,
    )
    torch._dynamo.reset()
    gc.collect()  # a trainer and its callbacks hold each other, and with them the model of the run before
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = step_seconds(_model(options, device), args, dataset, _WARMUP)
    return times, torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None


def _bf16(options: BenchTrain, device: torch.device) -> bool:
    return device.type == "cuda" if options.bf16 is None else options.bf16


_COLUMNS: dict[str, Callable[[ResultRow], str]] = {
    "soft stage, schedule": lambda r: r["variant"],
    "dense ms": lambda r: f"{r['dense_ms']:.1f}",
    "lte ms": lambda r: f"{r['lte_ms']:.1f}",
    "lte / dense": lambda r: f"{r['ratio']:.2f}",
    "dense tok/s": lambda r: f"{r['dense_tokens_per_s']:,.0f}",
    "lte tok/s": lambda r: f"{r['lte_tokens_per_s']:,.0f}",
    "steps to group and fit": lambda r: f"{r['begin_steps']:.1f}",
    "GB": lambda r: "" if r["lte_memory_gb"] is None else f"{r['lte_memory_gb']:.1f}",
}


def _line(row: ResultRow) -> str:
    return "  ".join(f"{name} {cell(row)}" for name, cell in _COLUMNS.items())
