"""Scores of tasks beside those of the original model."""

import pytest

from lte.report.originals import scores
from lte.report.results import read_results
from result_rows import write


def evaluated(model, accuracy, exact, *, made=(), method="dense", questions=40, **more):
    """A line of lte eval --tasks --json."""
    results = {"mmlu": {"acc,none": accuracy}, "gsm8k": {"exact_match,flexible-extract": exact}}
    measured = {"kind": "lm_eval", "data": ["mmlu", "gsm8k"], "options": {"limit": questions, **more}}
    found = {"command": f"lte eval {model}", "model": model, "method": {"method": method}, "measured": measured}
    found |= {"results": results, "num_samples": dict.fromkeys(results, questions), "mode": "hard"}
    found |= {"sparsity": 0.0 if method == "dense" else 0.5, "gflops_per_token": 0.2, "gflops_per_token_dense": 0.2}
    return found | {"made": [{"model": one, "options": {"target_sparsity": 0.5}} for one in made]}


def table(tmp_path, *rows):
    found = scores(read_results([write(tmp_path / "rows.jsonl", list(rows))]).measurements)
    return [one.tables[0] for one in found]


def test_shares_of_the_original(tmp_path):
    original = evaluated("models/qwen", 0.5, 0.4)
    tuned = evaluated("out/tuned", 0.55, 0.3, made=["models/qwen"]) | {"steps": {"dense": 300}}
    sparse = evaluated("out/sparse", 0.45, 0.392, made=["models/qwen"], method="lte")
    (found,) = table(tmp_path, original, tuned, sparse)
    assert found.header[3:] == ("mmlu: accuracy, %", "gsm8k: exact match, %")
    assert found.rows == (
        ("qwen, the original", "0.0", "0.2", "50.00", "40.00"),
        ("qwen, dense", "0.0", "0.2", "55.00 (110.0%)", "30.00 (75.0%)"),
        ("qwen, LTE", "50.0", "0.2", "45.00 (90.0%)", "39.20 (98.0%)"),
    )


@pytest.mark.parametrize("change", [{"questions": 41}, {"num_fewshot": 5}, {"apply_chat_template": True}])
def test_other_questions_are_not_compared(tmp_path, change):
    sparse = evaluated("out/sparse", 0.45, 0.392, made=["models/qwen"], method="lte", **change)
    assert table(tmp_path, evaluated("models/qwen", 0.5, 0.4), sparse) == []


def test_another_original_is_not_compared(tmp_path):
    sparse = evaluated("out/sparse", 0.45, 0.392, made=["models/llama"], method="lte")
    assert table(tmp_path, evaluated("models/qwen", 0.5, 0.4), sparse) == []
