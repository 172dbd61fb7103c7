"""Each of GLUE's nine tasks by its recipe, from files laid out as the official ones: trained, saved, evaluated."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForSequenceClassification

from lte.cli.main import main

RECIPES = Path(__file__).parents[2] / "recipes"
MNLI = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
CLASSES = {"accuracy", "f1", "matthews"}
TASKS = {  # header line (or none), a row, labels, options, metrics
    "cola": ("", "gj04\t{label}\t*\tSentence {n}.", "01", [], CLASSES),
    "sst2": ("sentence\tlabel", 'a "quoted film {n}\t{label}', "01", [], CLASSES),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "{label}\t{n}\t{n}\tHe said {n}.\tShe said {n}.",
        "01",
        [],
        CLASSES,
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "{n}\tmain\tnews\t2012\t{n}\tnone\tnone\tA plane {n}.\tA bird {n}.\t{label}.2{n}",
        "0134",
        [],
        {"pearson", "spearman"},
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "{n}\t{n}\t{n}\tWhat is {n}?\tWho is {n}?\t{label}",
        "01",
        [],
        CLASSES,
    ),
    "mnli": (
        "\t".join([*MNLI.split(), "sentence1", "sentence2", "label1", "gold_label"]),
        "\t".join(["{n}"] * 8 + ["It is {n}.", "It was {n}.", "neutral", "{label}"]),
        ("entailment", "neutral", "contradiction"),
        ["--text-column", "sentence1,sentence2", "--label-column", "gold_label"],
        {"accuracy", "matthews"},
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        "{n}\tWhat is {n}?\tIt is {n}.\t{label}",
        ("entailment", "not_entailment"),
        [],
        CLASSES,
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        "{n}\tIt is {n}.\tIt was {n}.\t{label}",
        ("entailment", "not_entailment"),
        [],
        CLASSES,
    ),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "{n}\tIt is {n}.\t{n} is.\t{label}", "01", [], CLASSES),
}
METRICS = {"accuracy", "f1", "matthews", "pearson", "spearman"}


@pytest.mark.parametrize("name", TASKS)
def test_train_and_eval(files, tmp_path, capsys, name):
    header, row, labels, options, metrics = TASKS[name]
    lines = [row.format(n=n, label=labels[n % len(labels)]) for n in range(24)]
    broken = ["12\tonly\tthree"] if name == "qqp" else []
    for part, rows in {"train.tsv": lines + broken, "dev.tsv": lines[:8]}.items():
        (tmp_path / part).write_text("".join(f"{line}\n" for line in [header, *rows] if line))
    given = ["train", str(RECIPES / f"{name}.yaml"), "--model", str(files / "bert"), "-o", str(tmp_path / "out")]
    given += ["--text", str(tmp_path / "train.tsv"), "--eval-text", str(tmp_path / "dev.tsv"), *options]
    given += ["--target-sparsity", "0.5", "--max-steps", "6", "--expert-size", "8", "--calibration-rows", "4"]
    given += ["--per-device-train-batch-size", "4", "--device", "cpu", "--no-bf16", "--save-strategy", "no"]
    assert main([*given, "--json"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    trained = json.loads(printed.out.splitlines()[-1])["evaluation"]
    assert {metric for metric in METRICS if trained[metric] is not None} == metrics
    assert trained["num_tokens"] == 8
    assert trained["sparsity"] > 0.2
    assert ("skipped 1 of 25 rows with a wrong number of fields" in printed.err) == (name == "qqp")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == (1 if name == "stsb" else len(labels))
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    again = ["eval", str(tmp_path / "out"), "--task", recipe["task"], "--text", str(tmp_path / "dev.tsv")]
    again += [
        "--text-column",
        recipe["text_column"],
        "--label-column",
        str(recipe["label_column"]),
    ]
    again += ["--header", "source", "label", "note", "sentence"] if name == "cola" else []
    assert main([*again, *options, "--sequence-length", "128", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {metric: found[metric] for metric in metrics} == pytest.approx({m: trained[m] for m in metrics}, abs=1e-4)


def test_regression_wants_numbers(files, tmp_path, capsys):
    (tmp_path / "a.tsv").write_text("text\tlabel\na\t1.5\nb\tgood\n")
    given = ["eval", str(files / "bert"), "--task", "regression", "--text", str(tmp_path / "a.tsv")]
    assert main(given) == 2
    assert "column 'label' holds 'good': regression needs numbers" in capsys.readouterr().err
