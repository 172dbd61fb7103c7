"""``lte train --resume``: the same run goes on, a finished one is left as it is, another one is refused."""

import json
import shutil

import numpy as np
import pytest

from lte.cli.main import main
from lte.evaluation.record import SUMMARY
from lte.training.checkpoints import RUN

OPTIONS = {
    "--sequence-length": "32",
    "--max-steps": "8",
    "--per-device-train-batch-size": "2",
    "--expert-size": "8",
    "--target-sparsity": "0.5",
    "--device": "cpu",
    "--report-to": "none",
    "--save-strategy": "steps",
    "--save-steps": "4",
}


def given(files, folder, changed=()):
    options = {"--model": str(files / "llama"), "--text": str(files / "text.txt"), **OPTIONS, **dict(changed)}
    return ["train", "-o", str(folder), *(one for item in options.items() for one in item)]


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert main(given(files, folder)) == 0
    return folder


def test_a_finished_run_is_left_as_it_is(files, finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "out")
    (folder / SUMMARY).unlink()
    (folder / "model.safetensors").unlink()
    assert main([*given(files, folder), "--resume", "--logging-steps", "1"]) == 0
    printed = capsys.readouterr().err
    assert "the run is finished" in printed
    assert "step 9" not in printed
    assert (folder / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    found, before = (json.loads((one / SUMMARY).read_text()) for one in (folder, finished))
    for name in ("eta", "steps", "evaluation", "method"):
        assert found[name] == before[name], name


def other_model(files, folder):
    model = shutil.copytree(files / "llama", folder / "other")
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-2] ^= 1
    (model / "model.safetensors").write_bytes(content)
    return {"--model": str(model)}


def other_text(files, folder):
    (folder / "other.txt").write_text((files / "text.txt").read_text().replace("7", "8"))
    return {"--text": str(folder / "other.txt")}


CHANGES = {
    "model.weights": other_model,
    "train_dataset.content": other_text,
    "train_dataset.sequence_length": {"--sequence-length": "16"},
    "train_dataset.rows": {"--held-out": "0.5"},
    "calibration_dataset.content": lambda files, folder: {"--calibration-text": str(files / "ids.npy")},
    "model.dtype": {"--dtype": "bfloat16"},
    "method.tau": {"--tau": "0.4"},
    "method.grouping": {"--grouping": "random"},
    "method.method": {"--method": "topk-moe"},
    "weight_decay": {"--weight-decay": "0.1"},
    "gradient_accumulation_steps": {"--gradient-accumulation-steps": "2"},
    "lr_scheduler_type": {"--lr-scheduler-type": "constant"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused(files, finished, tmp_path, capsys, name):
    change = CHANGES[name](files, tmp_path) if callable(CHANGES[name]) else CHANGES[name]
    before = {str(path): path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert main([*given(files, finished, change), "--resume"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("lte: error: the checkpoint's run has ")
    assert f"{name} " in error
    assert {str(path): path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_the_same_data_by_another_path_is_the_same_run(files, finished, tmp_path):
    folder, text = shutil.copytree(finished, tmp_path / "out"), shutil.copy(files / "text.txt", tmp_path / "moved.txt")
    model = shutil.copytree(files / "llama", tmp_path / "moved")
    assert main([*given(files, folder, {"--text": str(text), "--model": str(model)}), "--resume"]) == 0


def test_a_fresh_start_among_checkpoints(files, finished, tmp_path, capsys):
    assert main(given(files, finished)) == 2
    assert "holds checkpoints of a run (checkpoint-8)" in capsys.readouterr().err
    folder = shutil.copytree(finished, tmp_path / "out")
    assert main([*given(files, folder, {"--max-steps": "6"}), "--overwrite"]) == 0
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_a_checkpoint_by_its_path(files, finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(folder / "checkpoint-8")
    assert main([*given(files, folder), "--resume-from-checkpoint", str(folder / "checkpoint-4")]) == 0
    weights = [one / "model.safetensors" for one in (folder, finished)]
    assert np.array_equal(*(np.fromfile(one, np.uint8) for one in weights))
    assert "no whole checkpoint" not in capsys.readouterr().err


def test_into_the_models_own_folder_is_refused(files, tmp_path, capsys):
    model = shutil.copytree(files / "llama", tmp_path / "llama")
    assert main(given(files, model, {"--model": str(model)})) == 2
    assert "is the model's own folder: give another one with -o" in capsys.readouterr().err
    assert {path.name for path in model.iterdir()} == {path.name for path in (files / "llama").iterdir()}


def test_what_is_left_in_the_folder(finished):
    names = {path.name for path in finished.iterdir()}
    assert RUN in names
    assert not any(name.startswith(".") for name in names)
