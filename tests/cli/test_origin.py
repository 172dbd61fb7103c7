"""The folder of a converted or calibrated model says how it was made, and evaluations of it say the same."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

import lte
from lte.cli.main import main
from lte.evaluation.record import SUMMARY, Made, records_in
from lte.report.curves import gather
from lte.report.results import read_results
from result_rows import write

SHORT = ["--sequence-length", "32", "--device", "cpu"]


def run(files, command, *given):
    assert main([command, *map(str, given), "--text", str(files / "text.txt"), *SHORT]) == 0


def evaluate(files, model, capsys):
    capsys.readouterr()
    run(files, "eval", model, "--json")
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def made_of(row):
    (record,) = records_in(row)
    return [Made("", step.model, step.data, step.options) for step in record.made]


def points(tmp_path, *rows):
    (task,) = gather(read_results([write(tmp_path / "rows.jsonl", rows)]).measurements)
    return [(curve.title, len(curve.points)) for curve in task.curves], task.repeated


@pytest.fixture(scope="module")
def dense_trained(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    given = ["--schedule", "dense", "--max-steps", "2", "--seed", "3", "--save-strategy", "no", "-o", folder]
    run(files, "train", "--model", files / "llama", *given)
    return folder


def test_one_conversion_in_two_folders_is_one_run(files, tmp_path, capsys):
    text, usual = (str(files / "text.txt"),), {"sequence_length": 32}
    model = ["--model", files / "llama"]
    for name, first, second, options in [
        ("Wanda", ["prune"], ["sparsify", "--method", "wanda", "--tokens=4096"], {"method": "wanda", **usual}),
        ("TEAL", ["sparsify", "--method=teal"], ["sparsify", "--method", "teal"], {"method": "teal", **usual}),
    ]:
        rows = []
        for folder, command in ((tmp_path / f"{name}-1", first), (tmp_path / f"{name}-2", second)):
            run(files, *command, *model, "-o", folder)
            rows.append(evaluate(files, folder, capsys))
            assert made_of(rows[-1]) == [Made("", str(files / "llama"), text, options)]
        assert points(tmp_path, *rows) == ([(name, 1)], 1)


def test_data_that_a_conversion_does_not_read_is_not_said(files, tmp_path, capsys):
    run(files, "prune", "--model", files / "llama", "--method", "magnitude", "-o", tmp_path)
    assert made_of(evaluate(files, tmp_path, capsys)) == [Made("", str(files / "llama"), (), {"method": "magnitude"})]


def test_a_conversion_follows_what_made_its_model(files, dense_trained, tmp_path, capsys):
    pruned, both = tmp_path / "pruned", tmp_path / "both"
    run(files, "prune", "--model", dense_trained, "-o", pruned)
    run(files, "sparsify", "--model", pruned, "--method", "static-pruning", "-o", both)
    row = evaluate(files, both, capsys)
    trained, wanda, last = made_of(row)
    assert trained == made_of(evaluate(files, dense_trained, capsys))[0]
    assert [(step.model, step.options["method"]) for step in (wanda, last)] == [("", "wanda"), ("", "static-pruning")]
    assert (row["seed"], row["method"]["method"]) == (3, "static-pruning")
    assert [one.split()[1] for one in row["trained_by"].split(" && ")] == ["train", "prune", "sparsify"]
    assert points(tmp_path, row) == ([("static pruning", 1)], 0)  # not a dense run, though training was


def test_the_seed_of_training_and_of_a_conversion_are_both_kept(files, dense_trained, tmp_path, capsys):
    rows = []
    for seed in ("0", "1"):
        options = ["--method", "moefication", "--expert-size", "8", "--fit-epochs", "1", "--seed", seed]
        run(files, "sparsify", "--model", dense_trained, *options, "-o", tmp_path / seed)
        rows.append(evaluate(files, tmp_path / seed, capsys))
    assert [row["seed"] for row in rows] == [3, 3]
    assert ["seed" in made_of(row)[-1].options for row in rows] == [False, True]
    (task,) = gather(read_results([write(tmp_path / "rows.jsonl", rows)]).measurements)
    assert [point.seeds for point in task.curves[0].points] == [2]


def test_a_conversion_replaces_what_another_run_left_in_its_folder(files, dense_trained, tmp_path, capsys):
    folder = shutil.copytree(dense_trained, tmp_path / "model")
    run(files, "sparsify", "--model", files / "llama", "--expert-size", "8", "-o", folder)
    row = evaluate(files, folder, capsys)
    assert made_of(row) == [Made("", str(files / "llama"), (), {"expert_size": 8})]
    assert "steps" not in row
    lte.densify(AutoModelForCausalLM.from_pretrained(folder)).save_pretrained(folder)
    assert evaluate(files, folder, capsys)["made"] == []


def test_a_calibrated_model_whose_folder_said_nothing(files, sparse, tmp_path, capsys):
    model, first, second = (tmp_path / name for name in ("model", "first", "second"))
    shutil.copytree(sparse, model)
    (model / SUMMARY).unlink()
    shutil.copytree(sparse, second)  # what it says is of another model
    run(files, "calibrate", model, "--target-sparsity", "0.3", "-o", first)
    run(files, "calibrate", first, "--target-sparsity", "0.6", "--seed", "4", "-o", second)
    options = {"target_sparsity": 0.6, "sequence_length": 32, "seed": 4}
    row = evaluate(files, second, capsys)
    assert made_of(row) == [Made("", str(model), (str(files / "text.txt"),), options)]
    assert row["method"]["method"] == "lte"
    assert points(tmp_path, row) == ([("LTE", 1)], 0)


def test_calibrations_of_models_of_two_seeds_are_two_runs(files, tmp_path, in_process, capsys):
    rows = []
    for seed in ("1", "2"):
        model, folder = tmp_path / f"model-{seed}", tmp_path / f"out-{seed}"
        run(files, "sparsify", "--model", files / "llama", "--expert-size", "8", "--seed", seed, "-o", model)
        ready = AutoModelForCausalLM.from_pretrained(model)
        lte.set_mode_(ready, "hard")
        ready.save_pretrained(model)
        then = ["--then", f"eval --text {files / 'text.txt'} {' '.join(SHORT)}"]
        run(files, "sweep", "calibrate", model, "--vary", "target-sparsity=0.3", "-o", folder, *then)
        rows.append(json.loads((folder / "rows.jsonl").read_text()))
    assert [(row["seed"], row["target_sparsity"]) for row in rows] == [(1, 0.3), (2, 0.3)]
    (task,) = gather(read_results([write(tmp_path / "rows.jsonl", rows)]).measurements)
    assert ([point.seeds for point in task.curves[0].points], task.repeated) == ([2], 0)


def test_a_folder_without_an_evaluation_is_to_be_measured_first(files, sparse, tmp_path, capsys):
    run(files, "calibrate", sparse, "--target-sparsity", "0.3", "-o", tmp_path / "denser")
    assert main(["report", str(tmp_path / "denser"), "-o", str(tmp_path / "r.html")]) == 2
    said = f"has no evaluation: run lte eval {tmp_path / 'denser'} --text FILE --json"
    assert said in capsys.readouterr().err


def test_a_sweep_of_a_model_that_stays_dense_says_how_it_was_made(files, tmp_path, in_process):
    then = ["--then", f"eval --text {files / 'text.txt'} {' '.join(SHORT)}"]
    given = ["--model", files / "llama", "--method", "magnitude", "--vary", "target-sparsity=0.002", "-o", tmp_path]
    run(files, "sweep", "prune", *given, *then)
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert (row["method"], row["made"][0]["model"]) == ({"method": "dense"}, str(files / "llama"))
