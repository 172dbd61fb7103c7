"""``lte sparsify --method`` and ``lte train --method``, and what the other commands make of such models."""

import json
from dataclasses import replace

import pytest

from lte.cli.main import main
from lte.evaluation.record import SUMMARY, records_in

METHODS = {
    "cats": [],
    "static-pruning": [],
    "deja-vu": ["--fit-epochs", "1"],
    "moefication": ["--expert-size", "8", "--fit-epochs", "2"],
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


def test_attention_sparsity(files, tmp_path, capsys):
    """Trained, inspected, calibrated and measured."""
    trained, calibrated, data = str(tmp_path / "out"), str(tmp_path / "new"), ["--text", str(files / "text.txt")]
    short = ["--sequence-length", "32", "--device", "cpu"]
    given = ["--expert-size", "8", "--target-sparsity", "0.5", "--attention-sparsity", "0.3", "--max-steps", "5"]
    given += ["--per-device-train-batch-size", "4", "--save-strategy", "no", "--report-to", "none"]
    assert main(["train", "--model", str(files / "llama"), *data, *short, *given, "-o", trained]) == 0
    summary = json.loads((tmp_path / "out" / "lte_training.json").read_text())
    assert summary["method"]["attention_sparsity"] == summary["made"][0]["options"]["attention_sparsity"] == 0.3
    assert summary["evaluation"]["attention_sparsity"] == pytest.approx(0.3, abs=0.05)
    assert main(["inspect", trained, "--json"]) == 0
    printed = capsys.readouterr().out
    assert "mode hard, 30% of attention's inputs left out" in printed
    found = json.loads(printed.splitlines()[-1])
    dense, sparse = found["cost_dense"], found["cost"]["0.5"]
    assert sparse["attention_gflops"] == pytest.approx(0.7 * dense["attention_gflops"])
    assert main(["calibrate", trained, *data, *short, "--target-sparsity", "0.6", "-o", calibrated]) == 0
    assert "attention 30" in capsys.readouterr().out
    assert main(["eval", calibrated, *data, *short, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["sparsity"], found["attention_sparsity"]) == pytest.approx((0.6, 0.3), abs=0.03)
    assert found["method"]["attention_sparsity"] == 0.3


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
    assert main(["eval", str(tmp_path), *data, "--class-names", "even", "odd", "--device", "cpu", "--json"]) == 0
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
    refused(capfd, given, "the dense model again with another target_sparsity")
    given = ["train", "--model", tmp_path / "cats", *data, "--target-sparsity", "0.4", "-o", tmp_path / "out"]
    refused(capfd, [*given, "--max-steps", "2"], "was made sparse by cats: give --method cats")
    refused(capfd, [*given, "--max-steps", "2", "--method", "cats"], "made for target_sparsity 0.5, but")


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_sparsify_prunes_as_prune_does(files, tmp_path, capsys, method):
    given = ["--model", str(files / "llama"), "--method", method, "--target-sparsity", "0.5", "--text"]
    given += [str(files / "text.txt"), "--sequence-length", "32", "--device", "cpu"]
    made = []
    for command in ("prune", "sparsify"):
        assert main([command, *given, "-o", str(tmp_path / command)]) == 0
        assert capsys.readouterr().out == f"{tmp_path / command}: 50.0% of the blocks' weights are 0\n"
        content = {path.name: path.read_bytes() for path in sorted((tmp_path / command).iterdir())}
        (origin,) = records_in(json.loads(content.pop(SUMMARY)))
        made.append((content, replace(origin, command="", made=[replace(step, command="") for step in origin.made])))
    assert made[0] == made[1]


@pytest.mark.parametrize("options", [["--pattern", "2:4"], ["--method", "magnitude", "--target-sparsity", "0.5"]])
def test_prune(files, tmp_path, capsys, options):
    data = ["--text", str(files / "text.txt"), "--sequence-length", "32", "--device", "cpu", "--json"]
    assert main(["prune", "--model", str(files / "llama"), "-o", str(tmp_path), *options, *data]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["weight_sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert found["gflops_per_token_if_skipped"] == pytest.approx(found["gflops_per_token_dense"] / 2, rel=1e-2)
    assert main(["eval", str(tmp_path), *data]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["sparsity"] == 0
    assert row["weight_sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert row["gflops_per_token"] == pytest.approx(row["gflops_per_token_dense"] / 2, rel=1e-2)
    assert row["method"]["method"] == ("magnitude" if "magnitude" in options else "wanda")
    assert main(["inspect", str(tmp_path)]) == 0
    assert f"dense, pruned by {row['method']['method']} to 50%" in " ".join(capsys.readouterr().out.split())
    assert (row["model"], row["command"].split()[:3]) == (str(tmp_path), ["lte", "eval", str(tmp_path)])


def test_prune_refused(files, tmp_path, capfd):
    given = ["prune", "--model", files / "llama", "-o", tmp_path / "out"]
    refused(capfd, given, "no data: give --text FILE")
    refused(capfd, [*given, "--pattern", "2:4", "--target-sparsity", "0.6"], "make them one")
    (tmp_path / "file").touch()
    refused(capfd, [*given, "-o", tmp_path / "file", "--method", "magnitude"], "is a file: give a folder")
    assert not (tmp_path / "out").exists()


def training(files, folder, *options):
    data = ["--text", files / "ids.npy", "--sequence-length", "32", "--max-steps", "8", "--save-strategy", "no"]
    given = ["train", "--model", files / "llama", *data, "--per-device-train-batch-size", "4", "-o", folder, *options]
    return [str(one) for one in given]


TRAINED = {
    "cats": ["--tokens", "200"],
    "deja-vu": ["--fit-epochs", "1", "--fit-learning-rate", "0.02", "--tokens", "200"],
    "moefication": ["--expert-size", "8", "--fit-epochs", "1", "--tokens", "200", "--activation", "relu"],
    "static-pruning": ["--tokens", "200"],
    "relufication": ["--activation", "relu2"],
    "topk-moe": ["--expert-size", "8", "--scores", "sigmoid"],
    "noisy-topk": ["--expert-size", "8", "--load-weight", "0.2"],
    "sigma-moe": ["--expert-size", "8", "--expert-dropout", "0.1"],
}


@pytest.mark.parametrize("name", TRAINED)
def test_train(files, tmp_path, capsys, name):
    argv = training(files, tmp_path, "--method", name, *TRAINED[name], "--target-sparsity", "0.75", "--seed", "3")
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["method"]["method"] == name
    assert found["method"]["target_sparsity"] == 0.75
    assert found["method"].get("seed", 3) == 3
    for flag, value in zip(TRAINED[name][::2], TRAINED[name][1::2], strict=True):
        assert str(found["method"][flag[2:].replace("-", "_")]) == value
    learns = name in ("topk-moe", "noisy-topk", "sigma-moe")
    assert found["steps"] == ({"dense": 2, "soft": 5, "hard": 1} if learns else {"dense": 2, "soft": 0, "hard": 6})
    assert found["evaluation"]["mode"] == "hard"
    assert found["evaluation"]["sparsity"] == pytest.approx(0.75, abs=0.05)
    given = ["eval", tmp_path, "--text", files / "text.txt", "--sequence-length", "32", "--device", "cpu", "--json"]
    assert main([str(one) for one in given]) == 0


def test_a_recipe_of_another_method(files, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("expert_size: 8\ngrouping: random\nlearning_rate: 0.002\n")
    argv = training(files, tmp_path / "out", "--method", "cats", "--target-sparsity", "0.5", "--json")
    assert main(["train", str(recipe), *argv[1:]]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["method"] == {"method": "cats", "target_sparsity": 0.5, "tokens": 4096, "activation": None}
    recipe.write_text("method: sigma-moe\nexpert_size: 8\ngrouping: random\ntarget_sparsity: 0.5\n")
    assert main(["train", str(recipe), *training(files, tmp_path / "other", "--json")[1:]]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["method"]["method"], found["method"]["expert_size"]) == ("sigma-moe", 8)


def test_train_refuses(files, tmp_path, capfd):
    target = ["--target-sparsity", "0.5"]
    refused(capfd, training(files, tmp_path / "a", "--method", "magic", *target), "unknown method 'magic'")
    refused(capfd, training(files, tmp_path / "a", "--method", "cats"), "target_sparsity is None")
    refused(capfd, training(files, tmp_path / "a", "--method", "cats", "--expert-size", "8", *target), "--expert-size")
    paper = ["--schedule", "paper", "--eta", "0.5"]
    refused(capfd, training(files, tmp_path / "a", "--method", "cats", *paper), "trains LTE's routers, not those of")
    many = ["--method", "topk-moe", "--expert-size", "32", "--target-sparsity", "0.9"]
    refused(capfd, training(files, tmp_path / "a", *many), "leaves none of 2 experts")
    refused(capfd, training(files, tmp_path / "a", "--method", "sigma-moe", "--expert-dropout", "2", *target), "2.0")
    assert not (tmp_path / "a" / "config.json").exists()


@pytest.mark.parametrize(
    ("model", "task", "text"),
    [("bert", "classification", "classes.jsonl"), ("t5", "generation", "prompts.jsonl")],
)
def test_train_a_mixture_on_the_other_tasks(files, tmp_path, capsys, model, task, text):
    given = ["--model", files / model, "--text", files / text, "--task", task, "--method", "sigma-moe"]
    given += ["--expert-size", "8", "--target-sparsity", "0.5", "--max-steps", "6", "--save-strategy", "no"]
    assert main([str(one) for one in ["train", *given, "-o", tmp_path, "--json"]]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["evaluation"]["sparsity"] == pytest.approx(0.5)


@pytest.mark.parametrize("method", ["teal", "wanda", "magnitude"])
def test_what_is_not_trained(tmp_path, capfd, method):
    given = ["train", "--model", "m", "--method", method, "-o", tmp_path]
    refused(capfd, given, f"{method} has no routers and is not trained: give lte sparsify --method {method}")


def test_an_evaluation_says_how_its_model_was_trained(files, tmp_path, capsys):
    data = ["--text", str(files / "text.txt"), "--sequence-length", "32", "--device", "cpu"]
    given = ["--model", str(files / "llama"), *data, "-o", str(tmp_path), "--method", "cats", "--max-steps", "2"]
    assert main(["train", *given, "--target-sparsity", "0.5", "--seed", "3", "--save-strategy", "no"]) == 0

    def row():
        capsys.readouterr()
        assert main(["eval", str(tmp_path), *data, "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    found = row()
    assert (found["method"]["method"], found["seed"], sum(found["steps"].values())) == ("cats", 3, 2)
    assert found["environment"]["device"].startswith("cpu")
    assert found["trained_by"].startswith("lte train --model ")
    assert sparsified(files, tmp_path, "static-pruning") == 0  # another model in the same folder
    found = row()
    assert found["method"]["method"] == "static-pruning"
    assert found["trained_by"].startswith("lte sparsify --model ")
    assert "steps" not in found
