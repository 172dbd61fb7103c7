"""Rows that commands write say in fields how a model was made and measured; two spellings of a command are one run."""

import json
from types import SimpleNamespace

import pytest

import lte
from lte.cli import sweep
from lte.cli.main import main
from lte.evaluation.record import SUMMARY, Made, Measured, records_in
from lte.report.curves import gather
from lte.report.older_rows import upgraded
from lte.report.results import read_results
from result_rows import write

SHORT = ["--sequence-length", "32", "--device", "cpu"]


def train(files, folder, *options):
    given = ["--model", str(files / "llama"), "--text", str(files / "text.txt"), "--eval-text", str(files / "ids.npy")]
    given += [*SHORT, "--max-steps", "4", "--expert-size", "8", "--save-strategy", "no", "--max-grad-norm", "0.5"]
    assert main(["train", *given, "--target-sparsity", "0.5", "-o", str(folder), *options]) == 0
    return json.loads((folder / SUMMARY).read_text())


def evaluate(files, model, capsys, *options):
    capsys.readouterr()
    assert main(["eval", str(model), "--text", str(files / "ids.npy"), *SHORT, "--json", *options]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return SimpleNamespace(folder=folder, row=train(files, folder, "--seed", "1"))


def without_captions(made):
    return [Made("", one.model, one.data, one.options) for one in made]


def test_what_training_writes(files, trained):
    (record,) = records_in(trained.row)
    options = {"sequence_length": 32, "expert_size": 8, "target_sparsity": 0.5, "max_steps": 4, "max_grad_norm": 0.5}
    options["compensation_rank"] = 2  # of a model of 64 neurons
    made = Made("", str(files / "llama"), (str(files / "text.txt"),), options)
    assert without_captions(record.made) == [made]
    assert record.measured == Measured("data", (str(files / "ids.npy"),), {"sequence_length": 32})
    assert (record.model, record.seed, record.recipe) == (str(files / "llama"), 1, "default")
    assert record.method.items() >= {"method": "lte", "expert_size": 8}.items()
    assert record.command.startswith("lte train ")
    assert records_in(json.loads(json.dumps(record.row()))) == [record]
    assert upgraded(trained.row) == trained.row


def test_what_evaluation_writes(files, trained, capsys):
    row = evaluate(files, trained.folder, capsys)
    (record,), (before,) = records_in(row), records_in(trained.row)
    assert (record.made, record.measured, record.seed, record.steps) == (
        before.made,
        before.measured,
        before.seed,
        before.steps,
    )
    assert record.trained_by == before.command
    assert records_in(json.loads(json.dumps(record.flat_row()))) == [record]
    assert upgraded(row) == row
    soft, few = (evaluate(files, trained.folder, capsys, *more) for more in (("--mode", "soft"), ("--max-rows", "9")))
    assert evaluate(files, trained.folder, capsys, "--mode", "hard")["measured"] == row["measured"]
    assert [one["measured"]["options"] for one in (soft, few)] == [
        {"sequence_length": 32, "mode": "soft"},
        {"sequence_length": 32, "max_rows": 9},
    ]


def test_two_spellings_are_one_run(files, trained, tmp_path, capsys):
    again = train(files, tmp_path / "again", "--recipe=default", "--router-bias=1", "--seed=1", "--weight-decay", "0.0")
    other = train(files, tmp_path / "other", "--seed", "1", "--router-bias", "2")
    assert again["made"][0]["options"] == trained.row["made"][0]["options"]
    assert other["made"][0]["options"] == {**trained.row["made"][0]["options"], "router_bias": 2.0}
    rows = [trained.row, again, evaluate(files, trained.folder, capsys)]
    for more, points in (([], 1), ([other], 2)):
        path = write(tmp_path / "rows.jsonl", [*rows, *more])
        (task,) = gather(read_results([path]).measurements)
        assert len(task.curves[0].points) == points
        assert task.repeated == 2
    assert main(["report", str(path), "-o", str(tmp_path / "r.md"), "--format", "md"]) == 0
    assert "\n2 runs of models; from " in (tmp_path / "r.md").read_text()


def test_python_and_the_command_are_one_run(files, trained, tmp_path):
    made = lte.train(
        str(files / "llama"),
        lte.LTEConfig(target_sparsity=0.5, expert_size=8, compensation_rank=2, seed=1),
        str(files / "text.txt"),
        str(tmp_path),
        data_config=lte.DataConfig(sequence_length=32),
        eval_data=str(files / "ids.npy"),
        dtype="float32",
        **{"max_steps": 4, "save_strategy": "no", "max_grad_norm": 0.5, "seed": 1, "use_cpu": True},
    )
    (record,), (before,) = records_in(made.summary), records_in(trained.row)
    assert without_captions(record.made) == without_captions(before.made)
    assert (record.command, record.measured) == ("", before.measured)


def test_calibrating_is_part_of_how_a_model_was_made(files, trained, tmp_path, capsys):
    given = ["--text", str(files / "text.txt"), *SHORT]
    assert main(["calibrate", str(trained.folder), *given, "--target-sparsity", "0.3", "-o", str(tmp_path)]) == 0
    (record,) = records_in(evaluate(files, tmp_path, capsys))
    (before,) = records_in(trained.row)
    calibrated = Made("", "", (str(files / "text.txt"),), {"target_sparsity": 0.3, "sequence_length": 32})
    assert without_captions(record.made) == [*without_captions(before.made), calibrated]


def test_an_evaluation_of_a_model_trained_before_rows_said_so(files, trained, tmp_path, capsys):
    summary = {name: value for name, value in trained.row.items() if name not in ("made", "measured", "model")}
    kept = (trained.folder / SUMMARY).read_text()
    try:
        (trained.folder / SUMMARY).write_text(json.dumps(summary))
        row = evaluate(files, trained.folder, capsys)
    finally:
        (trained.folder / SUMMARY).write_text(kept)
    assert row["made"] == []
    (record,) = records_in(upgraded(row))
    assert record.made[0].options["max_grad_norm"] == "0.5"
    assert record.measured.options == {"sequence_length": 32}


def test_what_a_sweep_writes(files, tmp_path, in_process, monkeypatch):
    given = ["--model", str(files / "llama"), "--text", str(files / "text.txt"), *SHORT, "--method", "cats"]
    then = ["--then", f"eval --text {files / 'ids.npy'} {' '.join(SHORT)}"]
    vary = ["--vary", "target-sparsity=0.4"]
    assert main(["sweep", "sparsify", *given, *vary, "-o", str(tmp_path), *then]) == 0
    path = tmp_path / sweep.ROWS
    (line,) = path.read_text().splitlines()
    (record,) = records_in(json.loads(line))
    options = {"method": "cats", "sequence_length": 32, "target_sparsity": 0.4}
    assert without_captions(record.made) == [Made("", str(files / "llama"), (str(files / "text.txt"),), options)]
    assert record.measured == Measured("data", (str(files / "ids.npy"),), {"sequence_length": 32})
    assert upgraded(json.loads(line)) == json.loads(line)
    # another spelling of it is done already
    monkeypatch.setattr(sweep, "_execute", lambda *_: pytest.fail("ran"))
    assert main(["sweep", "sparsify", "--tokens=4096", *given, *vary, "-o", str(tmp_path), *then]) == 0
    assert path.read_text().splitlines() == [line]
