"""``lte sparsify --method``, and what the other commands make of such models."""

import json

import pytest

from lte.cli.main import main

METHODS = {
    "cats": [],
    "static-pruning": [],
    "deja-vu": ["--epochs", "1"],
    "moefication": ["--expert-size", "8", "--epochs", "2"],
    "moefication oracle": ["--expert-size", "8", "--selection", "oracle"],
}


def sparsified(files, folder, name, *options):
    given = ["sparsify", "--model", str(files / "llama"), f"--method={name.split()[0]}", *METHODS[name], *options]
    return main([*given, "--text", str(files / "text.txt"), "--sequence-length", "32", "-o", str(folder)])


@pytest.mark.parametrize("name", METHODS)
def test_sparsify_inspect_eval(files, tmp_path, capsys, name):
    assert sparsified(files, tmp_path, name, "--target-sparsity", "0.75") == 0
    assert "2 FFNs of" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--json", "--sparsity", "0.75"]) == 0
    inspected = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert inspected["lte"]["method"] == name.split()[0]
    assert inspected["lte"]["mode"] == "hard"
    given = ["eval", str(tmp_path), "--text", str(files / "text.txt"), "--sequence-length", "32", "--max-rows", "40"]
    assert main([*given, "--device", "cpu", "--json"]) == 0
    printed = capsys.readouterr()
    assert "idle experts are computed too" in printed.err
    found = json.loads(printed.out.splitlines()[-1])
    assert found["mode"] == "hard"
    assert found["sparsity"] == pytest.approx(0.75, abs=0.03)
    assert found["gflops_per_token"] == pytest.approx(inspected["cost"]["0.75"]["gflops"], rel=0.03)
    assert found["gflops_per_token"] < found["gflops_per_token_dense"]


def test_teal(files, tmp_path, capsys):
    data = ["--text", str(files / "text.txt"), "--sequence-length", "32"]
    given = ["sparsify", "--model", str(files / "llama"), "--method", "teal", *data, "-o", str(tmp_path)]
    assert main([*given, "--target-sparsity", "0.6"]) == 0
    assert "thresholds on the inputs of 14 linear layers" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--json", "--sparsity", "0.6"]) == 0
    printed = capsys.readouterr().out
    assert "TEAL's thresholds, 60% of the inputs" in printed
    inspected = json.loads(printed.splitlines()[-1])
    assert main(["eval", str(tmp_path), *data, "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["sparsity"] == pytest.approx(0.6, abs=0.03)
    assert found["attention_sparsity"] == pytest.approx(0.6, abs=0.03)
    assert found["gflops_per_token"] == pytest.approx(inspected["cost"]["0.6"]["gflops"], rel=0.05)
    assert main(["generate", str(tmp_path), "--prompt", "1 and 2", "--max-new-tokens", "5", "--device", "cpu"]) == 0
    rows = ["--task", "generation", "--generate", "--text", str(files / "prompts.jsonl"), "--max-rows", "3"]
    assert main(["eval", str(tmp_path), *rows, "--max-new-tokens", "4", "--device", "cpu", "--json"]) == 0
    assert 0.4 < json.loads(capsys.readouterr().out.splitlines()[-1])["sparsity"] < 0.8


def test_generate(files, tmp_path, capsys):
    assert sparsified(files, tmp_path, "cats") == 0
    capsys.readouterr()
    given = ["generate", str(tmp_path), "--prompt", "1 and 2", "--max-new-tokens", "5", "--device", "cpu", "--json"]
    assert main(given) == 0
    printed = capsys.readouterr()
    assert "ActivationRouter, not LTE's router: its kernels cannot run it" in printed.err
    assert 0.2 < json.loads(printed.out.splitlines()[-1])["sparsity"] < 0.8


def test_bert_by_labels(files, tmp_path, capsys):
    data = ["--text", str(files / "classes.jsonl"), "--task", "classification"]
    given = ["sparsify", "--model", str(files / "bert"), "--method", "cats", *data, "-o", str(tmp_path)]
    assert main(given) == 0
    assert main(["eval", str(tmp_path), *data, "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sparsity"] == pytest.approx(0.5, abs=0.02)


def refused(capfd, argv, message):
    assert main([str(one) for one in argv]) == 2
    printed = capfd.readouterr().err
    assert message in printed
    assert len(printed.strip().splitlines()) == 1


def test_refused(files, tmp_path, capfd):
    given = ["sparsify", "--model", files / "llama", "-o", tmp_path / "out"]
    refused(capfd, [*given, "--method", "magic"], "unknown method 'magic': this version of lte knows cats, deja-vu")
    refused(capfd, [*given, "--method", "cats"], "no data: give --text FILE")
    refused(capfd, [*given, "--method", "cats", "--expert-size", "8"], "--expert-size")
    refused(capfd, [*given, "--target-sparsity", "0.5"], "--target-sparsity")  # lte takes it when it is trained
    refused(capfd, [*given, "--method", "cats", "--target-sparsity", "50"], "target_sparsity is 50")
    assert not (tmp_path / "out").exists()


def test_commands_for_lte_refuse(files, tmp_path, capfd):
    assert sparsified(files, tmp_path / "cats", "cats") == 0
    capfd.readouterr()
    data = ["--text", files / "text.txt", "--sequence-length", "32", "--device", "cpu"]
    given = ["calibrate", tmp_path / "cats", *data, "--target-sparsity", "0.4", "-o", tmp_path / "out"]
    refused(capfd, given, "convert the dense model again with another target_sparsity")
    given = ["train", "--model", tmp_path / "cats", *data, "--target-sparsity", "0.4", "-o", tmp_path / "out"]
    refused(capfd, [*given, "--max-steps", "2"], "fine-tune it with transformers.Trainer")


@pytest.mark.parametrize("options", [["--pattern", "2:4"], ["--method", "magnitude", "--target-sparsity", "0.5"]])
def test_prune(files, tmp_path, capsys, options):
    data = ["--text", str(files / "text.txt"), "--sequence-length", "32", "--device", "cpu", "--json"]
    assert main(["prune", "--model", str(files / "llama"), "-o", str(tmp_path), *options, *data]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["weight_sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert found["gflops_per_token_if_skipped"] == pytest.approx(found["gflops_per_token_dense"] / 2, rel=1e-2)
    assert main(["eval", str(tmp_path), *data]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sparsity"] == 0


def test_prune_refused(files, tmp_path, capfd):
    given = ["prune", "--model", files / "llama", "-o", tmp_path / "out"]
    refused(capfd, given, "no data: give --text FILE")
    refused(capfd, [*given, "--pattern", "2:4", "--target-sparsity", "0.6"], "make them one")
    assert not (tmp_path / "out").exists()
