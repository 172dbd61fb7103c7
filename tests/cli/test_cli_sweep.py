import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lte.cli import child, sweep
from lte.cli.main import main
from lte.cli.sweep_table import show
from lte.evaluation.record import SUMMARY
from lte.training import lock as locking
from lte.training.lock import alone_in

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
    assert "had other options: take another folder" in capsys.readouterr().err


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
    assert main(["sweep", "train", *arguments[1:]]) == 0
    assert len(tries) == 3
    given = " ".join([*base(files), "--target-sparsity 0.5 --seed 2"])
    assert rows(tmp_path)[1]["command"] == f"lte train {given} --output-dir {tmp_path / 'seed-2'} --resume"


def test_values_too_long_for_the_name_of_a_folder(files, tmp_path):
    data = [f"{files / 'text.txt'}{'é' * 150}{n}" for n in (1, 2)]
    runs = sweep.plan(
        "train", [f"text={','.join(data)}", "seed=1"], [*base(files), "--target-sparsity", "0.5"], tmp_path
    )
    assert len({run.folder for run in runs}) == 2
    for run in runs:
        run.folder.mkdir()
        run.folder.with_suffix(run.folder.suffix + ".log").touch()
    again = sweep.plan("train", [f"text={data[1]}", "seed=1"], [*base(files), "--target-sparsity", "0.5"], tmp_path)
    assert again[0].folder == runs[1].folder


@pytest.mark.slow
def test_the_error_of_a_run_is_what_it_said_last(files, tmp_path):
    arguments = [*base(files, text=files / "absent.txt"), "--target-sparsity", "0.5"]
    run = sweep.Run("train", {"seed": "1"}, arguments, None, tmp_path / "a")
    row = sweep._execute(run, dict(os.environ), False)
    assert "absent.txt" in row["error"]
    assert not row["error"].startswith("lte:")


@pytest.mark.slow
def test_the_error_of_a_further_evaluation_is_what_it_said_last(files, tmp_path):
    arguments = [*base(files), "--target-sparsity", "0.5", "-o", str(tmp_path / "a")]
    run = sweep.Run("train", {"seed": "1"}, arguments, None, tmp_path / "a", ("eval --text absent.txt",))
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
        (["--vary", "seed=1", "--jobs", "0"], "at least 1 is needed"),
        (["--vary", "target-sparsity=0.5,2"], "target_sparsity is 2"),
        (["--vary", "colour=red"], "colour"),
        (["--vary", "method=lte,magic"], "unknown method 'magic'"),
        (["--vary", "method=lte,cats"], "--expert-size"),
        (["--vary"], "nothing varies"),
        (["--vary", "seed=1", "--then", "eval --max-rows 0"], "max_rows is 0"),
        (["--vary", "seed=1", "--then", "train --seed 1"], "is no eval"),
        (["--vary", "seed=1", "--then", "eval --colour red"], "colour"),
        (["--vary", "seed=1", "--then", "eval"], "does not name its data"),
        (["--vary", "seed=1", "--then", "eval --text t.txt --generate"], "only the task generation"),
        (["--vary", "seed=1,1"], "two runs would share the folder seed-1"),
        (["--vary", "output-dir=a,b"], "output-dir cannot vary"),
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


def test_a_row_that_was_cut_off(files, tmp_path, capsys):
    (tmp_path / sweep.ROWS).write_text('{"run": {"seed": "1"}, "command": "lte tr')
    arguments = [*base(files), "--target-sparsity", "0.5", "--vary", "seed=1", "-o", str(tmp_path)]
    assert main(["sweep", *arguments]) != 0
    assert "rows.jsonl line 1 is no row of a sweep" in capsys.readouterr().err


def test_rows_say_what_they_were_made_from(files, tmp_path, in_process, capsys):
    text, recipe = shutil.copy(files / "text.txt", tmp_path / "t.txt"), tmp_path / "r.yaml"
    recipe.write_text("tokens: 200\n")
    folder = tmp_path / "out"
    given = ["--model", str(files / "llama"), "--text", str(text), "--method", "cats", "--vary", "target-sparsity=0.5"]
    arguments = swept("sparsify", files, folder, *given)
    assert main(arguments) == 0
    (row,) = rows(folder)
    assert {*row["identity"]} == {"options", str(files / "llama"), str(text), str(files / "text.txt")}
    assert main(arguments) == 0
    Path(text).write_text(Path(text).read_text() + "another line.\n")
    assert main(arguments) == 2
    assert f"but then {text} had another content: take another folder" in capsys.readouterr().err
    assert rows(folder) == [row]


def test_rows_of_another_recipe_or_model_are_not_taken(files, tmp_path, monkeypatch, capsys):
    recipe, model = tmp_path / "r.yaml", shutil.copytree(files / "llama", tmp_path / "llama")
    evaluation = {"perplexity": 2.0, "accuracy": None, "sparsity": 0.5, "gflops_per_token": 1.0}

    def execute(run, _environment, _discard):
        row = {"run": run.varied, "command": run.command, "identity": run.identity}
        return {**row, "evaluation": evaluation, "seconds": 1.0}

    monkeypatch.setattr(sweep, "_execute", execute)
    recipe.write_text("target_sparsity: 0.5\nweight_decay: 0.1\n")
    given = ["sweep", str(recipe), *base(files), "--model", str(model), "--vary", "seed=1", "-o", str(tmp_path / "out")]
    assert main(given) == 0
    recipe.write_text("target_sparsity: 0.5\nweight_decay: 0.1\nlogging_steps: 7\n")  # may change
    assert main(given) == 0
    recipe.write_text("target_sparsity: 0.5\nweight_decay: 0.2\n")
    assert main(given) == 2
    assert "its recipe, or this version of lte, had other options" in capsys.readouterr().err
    recipe.write_text("target_sparsity: 0.5\nweight_decay: 0.1\n")
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert main(given) == 2
    assert f"{model} had another content" in capsys.readouterr().err
    path = tmp_path / "out" / sweep.ROWS
    path.write_text(json.dumps({name: one for name, one in rows(path.parent)[0].items() if name != "identity"}) + "\n")
    assert main(given) == 0  # a row of before there were identities


def test_two_sweeps_in_a_folder(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "_execute", lambda *_: pytest.fail("ran"))
    lock = f"import runpy, sys; alone_in = runpy.run_path({locking.__file__!r})['alone_in']\n"
    hold = lock + "with alone_in(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        arguments = [*base(files), "--target-sparsity", "0.5", "--vary", "seed=1", "-o", str(tmp_path)]
        assert main(["sweep", *arguments]) == 2
        other.kill()
    assert f"{tmp_path} is in use by process {other.pid} on " in capsys.readouterr().err


PARENT = """
import runpy, subprocess, sys, threading, os
child = f"import runpy; end = runpy.run_path({sys.argv[1]!r}); {sys.argv[2]}; end['end_with']({os.getpid()})"
child += "; import time; print('ready', flush=True); time.sleep(60)"
threading.Thread(target=lambda: subprocess.run([sys.executable, "-c", child])).start()
"""


@pytest.mark.parametrize("by", ["pass", "end['end_with'].__globals__['_told_the_kernel'] = lambda: False"])
def test_a_run_ends_with_its_killed_sweep(by):
    command = [sys.executable, "-c", PARENT, child.__file__, by]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        assert parent.communicate(timeout=30)[0] == ""  # it lasts until the child has closed it, too


def test_a_run_whose_sweep_has_ended_before_it_began(monkeypatch):
    ended = []
    monkeypatch.setattr(child, "_told_the_kernel", lambda: True)
    monkeypatch.setattr(child.os, "_exit", ended.append)
    child.end_with(os.getppid())
    assert ended == []
    child.end_with(2**22 + 1)
    assert ended == [1]


@pytest.mark.slow
def test_a_sweep_that_is_killed_leaves_nothing_running(files, tmp_path):
    arguments = [*base(files, **{"max-steps": 100000}), "--target-sparsity", "0.5", "--vary", "seed=1"]
    command = [sys.executable, "-m", "lte.cli.main", "sweep", *arguments, "-o", str(tmp_path)]
    log = tmp_path / "seed-1.log"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while "step " not in (log.read_text() if log.exists() else ""):
            assert process.poll() is None
            time.sleep(0.1)
        with pytest.raises(ValueError, match="is in use by process"), alone_in(tmp_path / "seed-1"):
            pass
        process.kill()
    time.sleep(1)
    with alone_in(tmp_path / "seed-1"), alone_in(tmp_path):
        pass


def swept(command, files, folder, *options):
    """Of a command that does not evaluate; arguments, the model's last."""
    short = ["--sequence-length", "32", "--device", "cpu"]
    then = ["--then", f"eval --text {files / 'text.txt'} {' '.join(short)}"]
    return ["sweep", command, *options, *short, "-o", str(folder), *then]


def reported(folder):
    assert main(["report", str(folder), "-o", str(folder / "r.md"), "--format", "md"]) == 0
    return (folder / "r.md").read_text()


def test_a_grid_of_methods_set_on_data(files, tmp_path, in_process, capsys):
    given = ["--model", str(files / "llama"), "--text", str(files / "ids.npy"), "--discard-models"]
    grid = ["--vary", "method=cats,teal", "target-sparsity=0.4"]
    arguments = swept("sparsify", files, tmp_path, *given, *grid)
    arguments.append(f"eval --text {files / 'ids.npy'} --sequence-length 16 --device cpu")
    assert main([*arguments, "--json"]) == 0
    shown = capsys.readouterr().out
    for text in ("method cats", "perplexity 2", "attention"):
        assert text in shown, text
    found = json.loads(shown.splitlines()[-1])["rows"]
    for row, name in zip(found, ("cats", "teal"), strict=True):
        assert row["run"] == {"method": name, "target-sparsity": "0.4"}
        assert row["command"].startswith(f"lte sparsify --model {files / 'llama'} ")
        assert (row["model"], row["target_sparsity"]) == (str(files / "llama"), 0.4)
        assert row["method"].items() >= {"method": name, "target_sparsity": 0.4}.items()
        assert row["environment"]["device"].startswith("cpu")
        assert row["evaluation"]["sparsity"] == pytest.approx(0.4, abs=0.05)
        assert row["evaluation"]["command"] in row["command"]
        assert [one["num_tokens"] != row["evaluation"]["num_tokens"] for one in row["evals"]] == [True]
        assert "seed" not in row
    assert not any(one.is_dir() for one in tmp_path.iterdir())  # of a discarded model its log is left

    written = (tmp_path / sweep.ROWS).read_text()
    assert main(arguments) == 0
    assert (tmp_path / sweep.ROWS).read_text() == written
    report = reported(tmp_path)
    assert "| CATS | " in report
    assert "| TEAL | " in report
    assert "/text, llama" in report
    assert "/ids, llama" in report


def test_a_run_that_was_cut_off_does_not_go_on_with_another_text(files, tmp_path, in_process):
    text, folder = shutil.copy(files / "text.txt", tmp_path / "t.txt"), tmp_path / "out"
    given = [*base(files, text=text), "--save-strategy", "steps", "--save-steps", "2", "--device", "cpu"]
    arguments = ["sweep", *given, "--target-sparsity", "0.5", "--vary", "seed=1", "-o", str(folder)]
    assert main(arguments) == 0
    whole = rows(folder)[0]["evaluation"]
    (folder / sweep.ROWS).unlink()
    assert main(arguments) == 0
    assert rows(folder)[0]["evaluation"] == whole
    (folder / sweep.ROWS).unlink()
    Path(text).write_text(Path(text).read_text().replace("7", "8"))
    assert main(arguments) == 1
    assert rows(folder)[0]["error"].startswith("the checkpoint's run has train_dataset.content ")


def test_seeds_of_a_method_set_on_data(files, tmp_path, in_process, capsys):
    given = ["--model", str(files / "llama"), "--text", str(files / "text.txt"), "--method", "deja-vu"]
    given += ["--fit-epochs", "1", "--tokens", "200"]
    assert main(swept("sparsify", files, tmp_path, *given, "--vary", "seed=1,2")) == 0
    assert "all, 2 seeds" in capsys.readouterr().out
    assert [row["seed"] for row in rows(tmp_path)] == [1, 2]
    (line,) = (line for line in reported(tmp_path).splitlines() if line.startswith("| Deja Vu |") and "±" in line)
    assert line.split("|")[4].strip() == "2"


def test_a_grid_of_pruned_models_with_a_run_that_fails(files, tmp_path, in_process, capsys):
    model = ["--model", str(files / "llama"), "--target-sparsity", "0.5"]
    arguments = swept("prune", files, tmp_path, *model, "--vary", "method=wanda,magnitude")
    assert main(arguments) == 1
    assert "error: method wanda: no data: give --text FILE" in capsys.readouterr().err
    failed, row = rows(tmp_path)
    assert failed["error"].startswith("no data")
    assert row["method"] == {"method": "magnitude", "target_sparsity": 0.5, "pattern": None}
    assert row["evaluation"]["weight_sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert (row["model"], row["target_sparsity"]) == (str(files / "llama"), 0.5)
    report = reported(tmp_path)
    assert "| magnitude pruning | " in report
    assert "| method wanda | no data" in report

    data = ["--text", str(files / "text.txt")]
    arguments = swept("prune", files, tmp_path / "data", *model, *data, "--vary", "method=wanda")
    assert main(arguments) == 0
    assert "weight_sparsity" in capsys.readouterr().out
    assert "| Wanda | " in reported(tmp_path / "data")


def test_a_grid_of_sparsities_of_a_trained_model(files, sparse, tmp_path, in_process):
    model, folder = shutil.copytree(sparse, tmp_path / "trained"), tmp_path / "out"
    training = {"command": "lte train", "seed": 3, "recipe": "default", "steps": {"dense": 1, "soft": 2, "hard": 1}}
    (model / SUMMARY).write_text(json.dumps({**training, "method": {"method": "lte"}}))
    cut_short = folder / "target-sparsity-0.3"
    cut_short.mkdir(parents=True)
    (cut_short / "model.safetensors").write_bytes(b"half of a")
    data = ["--text", str(files / "text.txt"), "--seed", "5"]
    arguments = swept("calibrate", files, folder, str(model), *data, "--vary", "target-sparsity=0.3,0.7")
    assert main(arguments) == 0
    found = rows(folder)
    for row, target in zip(found, (0.3, 0.7), strict=True):
        assert row["evaluation"]["sparsity"] == pytest.approx(target, abs=0.05)
        assert (row["model"], row["target_sparsity"], row["seed"]) == (str(model), target, 5)
        assert (row["method"]["method"], row["recipe"]) == ("lte", "default")
    assert "| LTE | " in reported(folder)

    with (folder / sweep.ROWS).open("w") as file:
        file.write(json.dumps(found[0]) + "\n")
    assert main(arguments) == 0
    again = rows(folder)
    assert again[0] == found[0]
    assert again[1]["evaluation"] == found[1]["evaluation"]


def test_a_run_that_diverged_has_failed(files, tmp_path, in_process):
    given = ["sweep", *base(files), "--recipe", "dense", "--learning-rate", "1e30", "--max-grad-norm", "0"]
    assert main([*given, "--device", "cpu", "--vary", "seed=1", "-o", str(tmp_path)]) == 1
    (row,) = rows(tmp_path)
    assert row["error"].startswith("training diverged in the dense stage, at step ")


def test_a_failed_evaluation_of_a_model_made_at_once(files, tmp_path, in_process, capsys):
    given = ["sweep", "prune", "--model", str(files / "llama"), "--method", "magnitude", "-o", str(tmp_path)]
    assert main([*given, "--vary", "target-sparsity=0.5", "--then", "eval --text absent.txt"]) == 1
    (row,) = rows(tmp_path)
    assert row["error"].startswith(f"eval {tmp_path / 'target-sparsity-0.5'} --text absent.txt --json: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["sparsify", "--model", "MODEL", "--vary", "method=cats"], 'add --then "eval --text FILE"'),
        (["prune", "--model", "MODEL", "--vary", "target-sparsity=0.5"], "lte prune does not evaluate"),
        (["calibrate", "MODEL", "--vary", "target-sparsity=0.5"], "lte calibrate does not evaluate"),
        (["sparsify", "--model", "MODEL", "--vary", "method=cats,magic", "--then", "eval"], "unknown method 'magic'"),
        (["sparsify", "--vary", "method=cats", "--then", "eval"], "--model"),
        (["prune", "--model", "MODEL", "--vary", "target-sparsity=0.5,2", "--then", "eval"], "target_sparsity is 2"),
        (["calibrate", "MODEL", "--vary", "target-sparsity=0.5,2", "--then", "eval"], "target_sparsity is 2"),
        (["calibrate", "MODEL", "--vary", "target-sparsity=0.5", "rows=0", "--then", "eval"], "rows is 0"),
        (["calibrate", "MODEL", "--vary", "target-sparsity=0.5", "--then", "eval --max-rows 0"], "max_rows is 0"),
        (["calibrate", "MODEL", "--vary", "target-sparsity=0.5", "--then", "prune"], "is no eval"),
    ],
)
def test_other_commands_refused_before_anything_runs(files, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(sweep, "_execute", lambda *_: pytest.fail("ran"))
    options = [str(files / "llama") if one == "MODEL" else one for one in options]
    assert main(["sweep", *options, "-o", str(tmp_path / "new")]) == 2
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
