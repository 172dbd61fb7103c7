import json
import os
from pathlib import Path

import pytest

from lte.cli import sweep
from lte.cli.main import main
from lte.cli.sweep_table import show

HERE = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def processes_find_lte(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def base(files, **changes):
    options = {"text": files / "ids.npy", "sequence-length": 32, "max-steps": 4, "expert-size": 8} | changes
    options |= {"model": files / "llama", "per-device-train-batch-size": 4, "save-strategy": "no"}
    return [one for name, value in options.items() for one in (f"--{name}", str(value))]


def rows(folder):
    return [json.loads(line) for line in (folder / sweep.ROWS).read_text().splitlines()]


@pytest.mark.slow
def test_a_grid_is_run_once(files, tmp_path, capsys):
    arguments = ["sweep", *base(files), "--vary", "target-sparsity=0.3,0.6", "seed=1,2", "--jobs", "2"]
    more = ["--then", f"eval --text {files / 'text.txt'} --sequence-length 16"]
    arguments = [*arguments, *more, "-o", str(tmp_path), "--discard-models"]
    assert main([*arguments, "--json"]) == 0
    shown = capsys.readouterr().out
    assert "2 seeds" in shown
    result = json.loads(shown.splitlines()[-1])["rows"]
    assert [row["run"] for row in result] == [
        {"target-sparsity": sparsity, "seed": seed} for sparsity in ("0.3", "0.6") for seed in ("1", "2")
    ]
    assert sorted(row["command"] for row in rows(tmp_path)) == sorted(row["command"] for row in result)
    assert [row["target_sparsity"] for row in result] == [0.3, 0.3, 0.6, 0.6]
    assert result[0]["evaluation"]["perplexity"] != result[1]["evaluation"]["perplexity"]
    assert not list(tmp_path.glob("**/*.safetensors"))

    for row in result:
        (also,) = row["evals"]
        assert also["perplexity"] > 1
        assert also["num_tokens"] != row["evaluation"]["num_tokens"]
        assert also["command"] in row["command"]

    assert main(arguments) == 0
    assert len(rows(tmp_path)) == 4

    others = ["sweep", *base(files, **{"max-steps": 5}), "--vary", "target-sparsity=0.3", "seed=1", "-o", str(tmp_path)]
    assert main(others) == 2
    assert "made with other options" in capsys.readouterr().err


@pytest.mark.slow
def test_a_grid_over_methods(files, tmp_path, capsys):
    options = [one for one in base(files) if one not in ("--expert-size", "8")]
    grid = ["--vary", "method=lte,deja-vu,sigma-moe", "target-sparsity=0.5", "-o", str(tmp_path)]
    assert main(["sweep", *options, "--dense-fraction", "0.25", *grid, "--discard-models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["method"]["method"] for row in found] == ["lte", "deja-vu", "sigma-moe"]
    assert [row["evaluation"]["sparsity"] for row in found] == pytest.approx([0.5, 0.5, 0.5], abs=0.06)


def test_a_run_that_fails_is_a_row_and_is_tried_again(files, tmp_path, monkeypatch, capsys):
    tries = []

    def execute(run, _environment, _discard):
        tries.append(run.varied)
        row = {"run": run.varied, "command": run.command, "seconds": 1.0}
        if run.varied["seed"] == "1" and tries.count(run.varied) == 1:
            return {**row, "error": "no luck"}
        return {**row, "evaluation": {"perplexity": 2.0, "accuracy": None, "sparsity": 0.5, "gflops_per_token": 1.0}}

    monkeypatch.setattr(sweep, "_execute", execute)
    arguments = ["sweep", *base(files), "--target-sparsity", "0.5", "--vary", "seed=1,2", "-o", str(tmp_path)]
    assert main(arguments) == 1
    assert "error: seed 1: no luck" in capsys.readouterr().err
    assert main(arguments) == 0
    assert tries == [{"seed": "1"}, {"seed": "2"}, {"seed": "1"}]
    capsys.readouterr()
    assert main(arguments) == 0  # what failed once and then went well has not failed
    assert "no luck" not in capsys.readouterr().err
    assert len(tries) == 3


def test_the_error_of_a_run_is_what_it_said_last(files, tmp_path):
    run = sweep.Run(
        {"seed": "1"}, [*base(files, text=files / "absent.txt"), "--target-sparsity", "0.5"], tmp_path / "a"
    )
    row = sweep._execute(run, dict(os.environ), False)
    assert "absent.txt" in row["error"]
    assert not row["error"].startswith("lte:")


@pytest.mark.slow
def test_the_error_of_a_further_evaluation_is_what_it_said_last(files, tmp_path):
    arguments = [*base(files), "--target-sparsity", "0.5", "-o", str(tmp_path / "a")]
    run = sweep.Run({"seed": "1"}, arguments, tmp_path / "a", ("eval --text absent.txt",))
    row = sweep._execute(run, dict(os.environ), False)
    assert "No such file or folder" in row["error"] or "absent.txt: " in row["error"]


def test_the_table_has_every_quality(capsys):
    more = {"sparsity": 0.5, "gflops_per_token": 1.0}
    scores = {"arc": {"acc,none": 0.25, "acc_stderr,none": 0.1, "em,strict": 0.125}}
    row = {"run": {"seed": "1"}, "evaluation": {"pearson": 0.75, **more}, "evals": [{"results": scores, **more}]}
    show([row])
    shown = capsys.readouterr().out
    for text in ("pearson 1", "0.75", "0.25", "0.125"):
        assert text in shown, text
    assert "stderr" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vary", "seed"], "does not say what varies"),
        (["--vary", "seed=1,,2"], "does not say what varies"),
        (["--vary", "seed=1", "seed=2"], "varies twice"),
        (["--vary", "seed=1", "--jobs", "0"], "at least one run"),
        (["--vary", "target-sparsity=0.5,2"], "target_sparsity is 2"),
        (["--vary", "colour=red"], "colour"),
        (["--vary", "method=lte,magic"], "unknown method 'magic'"),
        (["--vary", "method=lte,cats"], "--expert-size"),
        (["--vary"], "nothing varies"),
        (["--vary", "seed=1", "--then", "eval --max-rows 0"], "max_rows is 0"),
        (["--vary", "seed=1", "--then", "train --seed 1"], "is no eval"),
        (["--vary", "seed=1", "--then", "eval --colour red"], "colour"),
    ],
)
def test_refused_before_anything_runs(files, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(sweep, "_execute", lambda *_: pytest.fail("ran"))
    base_options = [*base(files), *([] if "target" in str(options) else ["--target-sparsity", "0.5"])]
    assert main(["sweep", *base_options, *options, "-o", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_slots_share_gpus_and_cores(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    found = [sweep._environment(slot, jobs=4) for slot in range(4)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["3", "5", "3", "5"]
    assert {one["OMP_NUM_THREADS"] for one in found} == {"2"}
