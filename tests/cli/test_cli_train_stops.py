"""``lte train`` before its first step, and where training goes wrong: one line, exit code 2, nothing broken left."""

import json
import shutil

import pytest
from transformers import GenerationConfig

from lte.cli.main import main
from lte.training import arguments, preflight

INERT = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 0}


def training(model, files, folder, *more):
    data = ["--text", str(files / "text.txt"), "--sequence-length", "32", "--device", "cpu", "--report-to", "none"]
    return ["train", "--model", str(model), *data, "--max-steps", "8", "-o", str(folder), *more]


def fails(argv, said, capsys):
    assert main(argv) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("lte: error: "))
    assert said in line
    return line


@pytest.mark.parametrize("method", [["--recipe", "dense"], ["--target-sparsity", "0.5", "--method", "cats"]])
def test_a_run_that_diverges(files, tmp_path, capsys, method):
    """After the second step weights are 1e30, and so is what they make of the third batch, or it is 0."""
    saving = ["--save-steps", "1", "--save-total-limit", "2", "--learning-rate", "1e30", "--warmup-steps", "2"]
    line = fails(training(files / "llama", files, tmp_path, *method, *saving), "training diverged in the ", capsys)
    assert f"{tmp_path / 'checkpoint-1'} is good" in line
    assert not list(tmp_path.glob("*.safetensors"))
    assert main(["eval", str(tmp_path / "checkpoint-1"), "--text", str(files / "text.txt"), "--device", "cpu"]) == 0


def test_weights_in_float16(files, tmp_path, capsys):
    more = ["--target-sparsity", "0.5", "--dtype", "float16"]
    fails(training("absent", files, tmp_path / "out", *more), "weights in float16 cannot be trained", capsys)


def test_a_logger_that_is_not_installed(files, tmp_path, capsys, monkeypatch):
    def missing(names):
        raise ValueError(f"{names} cannot be used: run `pip install wandb`")

    monkeypatch.setattr(arguments, "check_loggers", missing)
    more = ["--target-sparsity", "0.5", "--report-to", "wandb"]
    fails(training("absent", files, tmp_path / "out", *more), "['wandb'] cannot be used: run `pip install", capsys)


def test_a_disk_that_is_too_small(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: type("usage", (), {"free": 1000}))
    more = ["--target-sparsity", "0.5"]
    fails(training(files / "llama", files, tmp_path / "out", *more), "free, but the run will write", capsys)


def test_generation_settings_without_effect_in_every_command(files, tmp_path):
    model = shutil.copytree(files / "llama", tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps(INERT))
    text = ["--text", str(files / "text.txt"), "--device", "cpu"]
    cats = ["--method", "cats", "--target-sparsity", "0.5"]
    commands = {
        "lte": ["sparsify", "--model", str(model), "--expert-size", "8"],
        "cats": ["sparsify", "--model", str(model), *cats, *text],
        "pruned": ["prune", "--model", str(model), *text],
        "trained": training(model, files, tmp_path / "trained", "--target-sparsity", "0.5"),
        "dense": training(model, files, tmp_path / "dense", "--recipe", "dense"),
        "calibrated": ["calibrate", str(tmp_path / "trained"), *text, "--target-sparsity", "0.4"],
    }
    for name, command in commands.items():
        output = [] if command[0] == "train" else ["-o", str(tmp_path / name)]
        assert main([*command, *output]) == 0
        saved = GenerationConfig.from_pretrained(tmp_path / name)
        assert {name: getattr(saved, name) for name in INERT} == INERT
