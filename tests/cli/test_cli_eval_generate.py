"""``lte eval --generate`` in process, and the recipes of the tasks that it is for."""

import csv
import json
from pathlib import Path

import pytest

from lte.cli.main import main
from lte.cli.options import as_written
from lte.cli.train import parse_train
from lte.data.prompts import load_prompts

RECIPES = Path(__file__).parents[2] / "recipes"
ROWS = [("name[A]", "A is here."), ("name[B], food[x]", "B has x."), ("name[A]", "Here is A."), ("name[C]", "C!")]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Like E2E's test set: attributes, and a row for each reference."""
    path = tmp_path_factory.mktemp("table") / "refs.csv"
    with path.open("w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("mr", "ref"), *ROWS])
    return path


def options(model, table, *more) -> list[str]:
    given = ["eval", model, "--task", "generation", "--text", table, "--prompt", "{mr}\\n", "--completion", "ref"]
    return [str(one) for one in [*given, "--device", "cpu", "--sequence-length", "64", *more]]


@pytest.mark.parametrize("model", ["sparse", "llama", "t5"])
def test_eval_generates(files, sparse, table, tmp_path, capsys, model):
    folder = sparse if model == "sparse" else files / model
    path = tmp_path / "made.jsonl"
    given = options(folder, table, "--json")
    assert main([*given, "--generate", "--max-new-tokens", "7", "--predictions", str(path)]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert "Traceback" not in printed.err
    assert "4 references" in printed.out
    assert {"rouge1", "rouge2", "rougeL", "bleu", "gflops_per_token", "gflops_per_token_dense"} <= found.keys()
    assert "predictions" not in found
    assert (found["num_prompts"], found["num_references"]) == (3, 4)
    assert (found["mode"], len(found["layer_sparsity"])) == (("hard", 2) if model == "sparse" else ("dense", 0))
    assert (0 < found["sparsity"] < 1) == (model == "sparse")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["name[A]\n", "name[B], food[x]\n", "name[C]\n"]
    assert [row["references"] for row in rows] == [["A is here.", "Here is A."], ["B has x."], ["C!"]]
    assert main(given) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["perplexity"] == pytest.approx(found["perplexity"])


def test_max_rows_counts_prompts(files, table, tmp_path, capsys):
    path = tmp_path / "made.jsonl"
    more = ["--generate", "--max-rows", "2", "--num-beams", "2", "--max-new-tokens", "3", "--predictions", path]
    assert main(options(files / "llama", table, *more, "--json")) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["num_prompts"], found["num_references"]) == (2, 3)
    assert found["num_tokens"] <= 6
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--generate", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--generate", "--num-beams", "0"], "num_beams is 0"),
        (["--generate", "--max-rows", "0"], "max_rows is 0"),
        (["--generate", "--max-new-tokens", "64"], "leave no room"),
        (["--generate", "--predictions", "none/made.jsonl"], "no such folder"),
        (["--predictions", "made.jsonl"], "without --generate"),
        (["--generate", "--task", "language_modelling"], "give --task generation"),
        (["--generate", "--completion", "nonsense"], "no column 'nonsense'"),
        (["--generate", "--num-beams", "many"], "many"),
    ],
)
def test_refusals(files, table, capfd, more, said):
    assert main(options(files / "llama", table, *more)) == 2
    printed = capfd.readouterr()
    assert len(printed.err.splitlines()) == 1, printed.err
    assert printed.err.startswith("lte: error: ")
    assert said in printed.err


def test_no_data(files, capfd):
    assert main(["eval", str(files / "llama"), "--task", "generation", "--generate"]) == 2
    assert "no data" in capfd.readouterr().err


def test_recipes_read_the_published_files(table, tmp_path):
    """E2E's columns, and for XSum those of HELM, whose prompts hold the instruction."""
    row = {"article": "###\nArticle: News.\n\nSummarize the above article in 1 sentence.\n", "summary_gt": "It is."}
    path = tmp_path / "xsum.jsonl"
    path.write_text(json.dumps(row) + "\n")
    common = ["--model", "m", "-o", "o", "--target-sparsity", "0.5"]
    e2e = parse_train([str(RECIPES / "e2e.yaml"), *common])
    assert load_prompts(table, as_written(e2e.data).data)[0][:2] == ["name[A]\n", "name[B], food[x]\n"]
    helm = ["--prompt", "article", "--completion", "summary_gt"]
    xsum = parse_train([str(RECIPES / "xsum.yaml"), *common, *helm])
    assert load_prompts(path, as_written(xsum.data).data) == ([row["article"]], ["It is."])
