"""``lte train`` with adapters, and its dry run."""

import json

import pytest

from lte.cli.main import main


def train(files, folder, *more):
    given = ["train", "--model", str(files / "llama"), "--text", str(files / "text.txt"), "-o", str(folder)]
    given += ["--target-sparsity", "0.5", "--max-steps", "8", "--sequence-length", "32", "--expert-size", "8"]
    given += ["--device", "cpu", "--save-strategy", "no", "--report-to", "none", "--json"]
    return main([*given, "--lora-rank", "4", *more])


def test_an_adapter_is_a_model_for_other_commands(files, tmp_path, capsys):
    assert train(files, tmp_path / "out", "--lora-targets", "up_proj", "q_proj", "--save-adapter") == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["made"][0]["options"]["lora_rank"] == 4
    assert not (tmp_path / "out" / "model.safetensors").exists()
    settings = json.loads((tmp_path / "out" / "lte_adapter.json").read_text())
    assert {name.rpartition(".")[2] for name in settings["targets"]} == {"up_proj", "q_proj"}
    evaluate = ["eval", str(tmp_path / "out"), "--text", str(files / "text.txt"), "--device", "cpu", "--json"]
    assert main([*evaluate, "--sequence-length", "32"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["mode"] == "hard"


def test_a_dry_run_trains_and_leaves_nothing(files, tmp_path, capsys):
    assert train(files, tmp_path / "out", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "steps: dense 2, soft 5, hard 1" in shown
    found = json.loads(shown.splitlines()[-1])
    assert found["parameters"].keys() == {"adapters", "compensation", "frozen", "norms and heads", "routers"}
    assert found["peak_bytes"] == sum(found["memory"].values())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--time-it"], "--time-it needs --dry-run"),
        (["--lora-targets", "query"], "the linear layers of the blocks are"),
        (["--optim", "galore_adamw_layerwise"], "routers would not learn: give galore_adamw"),
    ],
)
def test_what_is_refused(files, tmp_path, capfd, options, said):
    assert train(files, tmp_path / "out", *options) == 2
    lines = capfd.readouterr().err.splitlines()
    assert said in lines[-1]
