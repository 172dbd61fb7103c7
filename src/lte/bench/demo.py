"""The work of ``lte demo``: train a dense and a sparse model for the same time, and measure how fast they decode."""

import json
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import PreTrainedModel

from lte.data.config import DataConfig
from lte.data.tasks import load_dataset_for
from lte.files import write_whole
from lte.inference.generate import generate
from lte.methods.lte import LTEConfig
from lte.surgery.loading import load_model, load_tokenizer
from lte.training.arguments import LTETrainingArguments
from lte.training.run import Trained, Watcher, train

PROMPT = "The with statement is used to"
BATCH = 2


@dataclass(frozen=True)
class Budget:
    """Sizes of the demo: seconds of training in all, tokens of a row, rows that are held out and for calibration."""

    seconds: float
    sequence_length: int
    held_out: int
    calibration: int
    new_tokens: int

    @property
    def tokens_per_step(self) -> int:
        return BATCH * self.sequence_length


FULL = Budget(seconds=600, sequence_length=256, held_out=32, calibration=8, new_tokens=64)
QUICK = Budget(seconds=85, sequence_length=128, held_out=16, calibration=6, new_tokens=24)


def write_topics(folder: Path, seed: int) -> Path:
    """Write Python's help topics as rows of a file, in a random order, and return its path."""
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    source = folder / "topics.jsonl"
    write_whole(source, "".join(json.dumps({"text": topics[name]}) + "\n" for name in names))
    return source


def measure_step(gguf: Path, source: Path, budget: Budget) -> tuple[bool, float]:
    """Return whether bf16 is faster than fp32 here, and the seconds of a dense training step."""
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
    return fastest, best[fastest] * 1.15  # for the optimizer


def steps_within(budget: Budget, seconds: float) -> int:
    """Return the training steps of each of the two models if a dense step takes ``seconds``."""
    return max(12, round(budget.seconds / (2.5 * seconds)))  # a dense run, and an LTE run with its teacher


def train_both(
    gguf: Path,
    source: Path,
    folder: Path,
    budget: Budget,
    steps: int,
    target_sparsity: float,
    seed: int,
    bf16: bool,
    watcher: Watcher,
    command: str,
) -> dict[str, Trained]:
    """Train a dense model and one by LTE, both into ``folder``, where the second replaces the first."""
    made: dict[str, Trained] = {}
    for name in ("dense", "lte"):
        args = LTETrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            learning_rate=1e-4,
            dense_fraction=0.1,
            bf16=bf16,
            use_cpu=True,
            seed=seed,
            logging_steps=max(1, steps // 30),
            save_strategy="no",
            report_to="none",
            calibration_rows=budget.calibration,
            schedule="dense" if name == "dense" else "default",
            target_sparsity=None if name == "dense" else target_sparsity,
        )
        made[name] = train(
            str(gguf),
            LTEConfig(seed=seed),
            str(source),
            data_config=DataConfig(sequence_length=budget.sequence_length),
            held_out=budget.held_out,
            watcher=watcher,
            command=command,
            args=args,
        )
    return made


@torch.no_grad()
def decode(
    models: Mapping[str, PreTrainedModel], tokenizer: Any, new_tokens: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Return tokens per second of greedy ``generate`` at batch 1 (median of three, models in turn), and the texts."""
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
