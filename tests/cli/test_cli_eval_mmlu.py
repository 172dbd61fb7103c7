"""``lte eval --mmlu`` in process."""

import json

import pytest

from lte.cli.main import main
from mmlu_folder import write_mmlu


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_mmlu(tmp_path_factory.mktemp("mmlu"))


@pytest.mark.parametrize("model", ["sparse", "llama"])
def test_eval_answers(files, sparse, folder, capsys, model):
    given = ["eval", str(sparse if model == "sparse" else files / model), "--mmlu", str(folder), "--device", "cpu"]
    assert main([*given, "--shots", "2", "--max-rows", "3", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert "Traceback" not in printed.err
    assert "12 questions of 4 subjects" in printed.out
    assert "philosophy" in printed.out
    assert (found["num_questions"], found["shots"]) == (12, 2)
    assert found["by_category"].keys() == {"STEM", "humanities", "other"}
    assert found["by_subject"]["anatomy"]["num_questions"] == 3
    assert found["accuracy"] == pytest.approx(sum(one["accuracy"] for one in found["by_subject"].values()) / 4)
    assert "predictions" not in found
    assert (found["mode"], len(found["layer_sparsity"])) == (("hard", 2) if model == "sparse" else ("dense", 0))
    assert (0 < found["sparsity"] < 1) == (model == "sparse")
    assert main([*given, "--subjects", "anatomy", "philosophy", "--batch-size", "1", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert found["by_subject"].keys() == {"anatomy", "philosophy"}
    assert found["fewer_shots"] == found["num_questions"] == 15  # 256 bytes hold no five examples
    assert "15 with fewer shots" in printed.out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--subjects", "anatomie"], "no subject 'anatomie'"),
        (["--split", "val"], "has no val/"),
        (["--shots", "6"], "shots is 6"),
        (["--max-rows", "0"], "max_rows is 0"),
        (["--text", "a.txt"], "leave --text"),
        (["--generate"], "leave --text"),
        (["--task", "classification"], "leave --text"),
        (["--mmlu", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_refusals(files, folder, capfd, more, said):
    assert main(["eval", str(files / "llama"), "--mmlu", str(folder), *more]) == 2
    printed = capfd.readouterr()
    assert len(printed.err.splitlines()) == 1, printed.err
    assert printed.err.startswith("lte: error: ")
    assert said in printed.err


@pytest.mark.parametrize("model", ["bert", "t5"])
def test_no_encoder(files, folder, capfd, model):
    assert main(["eval", str(files / model), "--mmlu", str(folder)]) == 2
    assert f"causal language model, not a {model}" in capfd.readouterr().err


def test_options_of_mmlu_alone(files, capfd):
    assert main(["eval", str(files / "llama"), "--text", str(files / "text.txt"), "--shots", "3"]) == 2
    assert "give its folder with --mmlu" in capfd.readouterr().err
