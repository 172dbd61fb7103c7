"""A model's own head: what commands do with one that classifies, and without one."""

import json
import shutil

import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from lte.cli.main import main

STEPS = ["--max-steps", "60", "--learning-rate", "1e-2", "--per-device-train-batch-size", "8", "--save-strategy", "no"]
TASK = ["--task", "classification"]


def write(path, names):
    rows = [{"text": f"{word} {n}", "label": name} for n in range(20) for word, name in names.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--text", str(path)]


@pytest.fixture(scope="module")
def classifier(files, tmp_path_factory):
    """Its classes are good and bad, which is not how they are sorted."""
    folder = tmp_path_factory.mktemp("heads")
    data = write(folder / "rows.jsonl", {"the": "good", "with": "bad"})
    given = [
        "train",
        "--model",
        str(files / "bert"),
        *TASK,
        *data,
        "--class-names",
        "good",
        "bad",
        "--schedule",
        "dense",
    ]
    assert main([*given, *STEPS, "-o", str(folder / "model")]) == 0
    return str(folder / "model"), data


def accuracy(capsys, *given):
    assert main(["eval", *given, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"]


def refused(capsys, *given):
    assert main([*given]) != 0
    return " ".join(capsys.readouterr().err.split())


def test_classes_are_in_the_models_order(classifier, tmp_path, capsys):
    model, data = classifier
    capsys.readouterr()
    assert accuracy(capsys, model, *TASK, *data) == 1
    assert accuracy(capsys, model, *TASK, *write(tmp_path / "one.jsonl", {"with": "bad"})) == 1
    assert accuracy(capsys, model, *TASK, *write(tmp_path / "places.jsonl", {"the": "0", "with": "1"})) == 1
    assert "labels worse are not in class_names, which are good, bad" in refused(
        capsys, "eval", model, *TASK, *write(tmp_path / "other.jsonl", {"the": "good", "with": "worse"})
    )


def test_classes_that_a_model_does_not_name_are_asked_for(classifier, tmp_path, capsys):
    model, data = classifier
    AutoModelForSequenceClassification.from_pretrained(
        model, id2label={0: "LABEL_0", 1: "LABEL_1"}, num_labels=2
    ).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    capsys.readouterr()
    assert "which of its classes are bad, good: name them" in refused(capsys, "eval", str(tmp_path), *TASK, *data)
    assert accuracy(capsys, str(tmp_path), *TASK, *data, "--class-names", "good", "bad") == 1


def test_what_a_checkpoint_was_trained_for_before_is_forgotten(classifier, tmp_path, capsys):
    model, data = classifier
    given = [
        "--text",
        write(tmp_path / "rows.jsonl", {"the": 1.5, "with": 2.5})[1],
        "--max-steps",
        "1",
        "--schedule",
        "dense",
    ]
    assert main(["train", "--model", model, "--task", "regression", *given, "-o", str(tmp_path / "a")]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "a").problem_type == "regression"
    given = [*data, "--max-steps", "1", "--schedule", "dense"]
    assert main(["train", "--model", str(tmp_path / "a"), *TASK, *given, "-o", str(tmp_path / "b")]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "b").problem_type == "single_label_classification"


def test_training_goes_on_with_its_classes(classifier, tmp_path, capsys):
    model, data = classifier
    given = ["train", "--model", model, *TASK, *data, "--schedule", "dense", "--max-steps", "1", "--learning-rate", "0"]
    assert main([*given, "-o", str(tmp_path / "more"), "--save-strategy", "no", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["evaluation"]["accuracy"] == 1
    assert AutoConfig.from_pretrained(tmp_path / "more").id2label == {0: "good", 1: "bad"}


@pytest.mark.parametrize("command", [["sparsify"], ["prune", "--method", "magnitude"]])
def test_converting_keeps_the_head(classifier, tmp_path, capsys, command):
    model, data = classifier
    target = ["--target-sparsity", "0.01"] if command[0] == "prune" else []
    assert main([*command, "--model", model, *target, "-o", str(tmp_path / "made")]) == 0
    capsys.readouterr()
    assert accuracy(capsys, str(tmp_path / "made"), *TASK, *data) == 1


def test_a_regression_is_calibrated(files, tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", {"the": 1.5, "with": 3.5, "of": 2.5})
    task = ["--task", "regression"]
    given = ["train", "--model", str(files / "bert"), *task, *data, "--target-sparsity", "0.5", "--expert-size", "8"]
    assert main([*given, "--max-steps", "6", "--save-strategy", "no", "-o", str(tmp_path / "model")]) == 0
    given = ["calibrate", str(tmp_path / "model"), *task, *data, "--target-sparsity", "0.3"]
    assert main([*given, "-o", str(tmp_path / "other"), "--json"]) == 0
    assert "pearson" in capsys.readouterr().out


def test_the_models_own_folder_is_not_overwritten(classifier, capsys):
    model, _ = classifier
    for command in (["sparsify"], ["prune", "--method", "magnitude"]):
        assert "is the model's own folder" in refused(capsys, *command, "--model", model, "-o", model)


def test_another_task_is_refused(classifier, files, tmp_path, capsys):
    model, data = classifier
    needs = "the model's head is for classification, but the task is language_modelling: give --task classification"
    assert needs in refused(capsys, "eval", model, *data)
    assert needs in refused(capsys, "sparsify", "--method", "cats", "--model", model, *data, "-o", str(tmp_path / "x"))
    numbers = write(tmp_path / "numbers.jsonl", {"the": 1.5, "with": 2.5})
    assert "but the task is regression" in refused(capsys, "eval", model, "--task", "regression", *numbers)
    three = write(tmp_path / "three.jsonl", {"the": "a", "with": "b", "of": "c"})
    assert "are not in class_names" in refused(capsys, "eval", model, *TASK, *three)


def test_a_model_without_the_head_is_refused(files, tmp_path, capsys):
    AutoModel.from_pretrained(files / "bert").save_pretrained(tmp_path / "bare")
    AutoTokenizer.from_pretrained(files / "bert").save_pretrained(tmp_path / "bare")
    bare = str(tmp_path / "bare")
    data = write(tmp_path / "rows.jsonl", {"the": "good", "with": "bad"})
    assert "has no head for classification" in refused(capsys, "eval", bare, *TASK, *data)
    text = ["--text", str(files / "text.txt")]
    assert "language_modelling asks for the next token" in refused(capsys, "eval", bare, *text)
    AutoModel.from_pretrained(files / "llama").save_pretrained(tmp_path / "bare")
    assert "has no head for language modelling" in refused(capsys, "eval", bare, *text)
    assert "has no head for language modelling" in refused(capsys, "generate", bare, "--prompt", "hi")


@pytest.mark.parametrize("head", ["without", "masked"])
def test_an_encoder_is_converted_as_it_was_saved(files, tmp_path, capsys, head):
    bert = AutoModel.from_pretrained(files / "bert") if head == "without" else None
    model = bert or AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(files / "bert"))
    model.save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(files / "bert").save_pretrained(tmp_path / "dense")
    text = ["--text", str(files / "text.txt"), "--sequence-length", "64", "--target-sparsity", "0.5"]
    for name, given in {"lte": ["--expert-size", "8"], "cats": text, "teal": text}.items():
        made = tmp_path / name
        given = ["sparsify", "--model", str(tmp_path / "dense"), "--method", name, *given, "-o", str(made)]
        assert main(given) == 0, capsys.readouterr().err
        capsys.readouterr()
        assert main(["inspect", str(made)]) == 0
        assert f"LTE{type(model).__name__}: family bert" in capsys.readouterr().out
        again = (AutoModel if bert else AutoModelForMaskedLM).from_pretrained(made, output_loading_info=True)[1]
        assert not again["missing_keys"]


@pytest.mark.parametrize(
    "command", ["inspect", "eval", "generate", "sparsify", "prune", "train", "calibrate", "report"]
)
def test_code_of_a_checkpoint_is_not_run_and_the_line_says_so(files, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    model, text = tmp_path / "model", ["--text", str(files / "text.txt")]
    shutil.copytree(files / "llama", model)
    values = json.loads((model / "config.json").read_text())
    auto_map = {"AutoConfig": "code.Made", "AutoModelForCausalLM": "code.Made"}
    (model / "config.json").write_text(json.dumps({**values, "model_type": "made", "auto_map": auto_map}))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Made: ...\n")
    output = ["-o", str(tmp_path / "out")]
    given = {
        "inspect": [str(model)],
        "eval": [str(model), *text],
        "generate": [str(model), "--prompt", "hi"],
        "calibrate": [str(model), *text, "--target-sparsity", "0.5", *output],
        "report": ["--model", str(model), *text, "-o", str(tmp_path / "page.html")],
        "train": ["--model", str(model), *text, "--max-steps", "1", "--target-sparsity", "0.5", *output],
        "prune": ["--model", str(model), "--method", "magnitude", *output],
    }.get(command, ["--model", str(model), *output])
    assert "code of its own" in refused(capsys, command, *given)
    assert not (tmp_path / "ran").exists()
