"""``lte quantise``, and ``--weights`` of the commands that run a model."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import lte
from lte.cli.main import main
from lte.evaluation.record import SUMMARY
from lte.modules.quantised_linear import is_quantised

CPU = ["--device", "cpu"]


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def int4(sparse, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int4") / "out"
    assert main(["quantise", str(sparse), "-o", str(folder), "--weights", "int4", *CPU]) == 0
    return folder


def test_a_folder_that_loads(sparse, int4, files, tmp_path, capsys):
    assert main(["quantise", str(sparse), "-o", str(tmp_path), "--weights", "int8", "--json", *CPU]) == 0
    said = last_json(capsys)
    assert (said["output"], said["weights"]) == (str(tmp_path), "int8")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (int4, tmp_path, sparse)]
    assert sizes == sorted(sizes)
    assert said["bytes"] == sizes[1]
    model = AutoModelForCausalLM.from_pretrained(int4)
    direct = lte.quantise_(AutoModelForCausalLM.from_pretrained(sparse), "int4")
    ids = torch.tensor([[5, 6, 7]])
    assert is_quantised(model)
    assert torch.equal(model(ids).logits, direct(ids).logits)
    made = json.loads((int4 / SUMMARY).read_text())["made"]
    assert [step["command"].split()[1] for step in made] == ["sparsify", "quantise"]
    assert made[1]["options"] == {"weights": "int4"}


def test_text_makes_another_choice(sparse, int4, files, tmp_path):
    text = ["--text", str(files / "text.txt"), "--sequence-length", "32"]
    assert main(["quantise", str(sparse), "-o", str(tmp_path), *text, *CPU]) == 0
    by_text, without = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path, int4))
    name = "model.layers.0.mlp.up_proj.rows"
    assert by_text[name].shape == without[name].shape
    assert not torch.equal(by_text[name], without[name])
    made = json.loads((tmp_path / SUMMARY).read_text())["made"][-1]
    assert made["data"] == [str(files / "text.txt")]
    assert made["options"] == {"weights": "int4", "sequence_length": 32}


def test_the_same_perplexity_from_a_folder_and_from_an_option(sparse, int4, files, capsys):
    data = ["--text", str(files / "text.txt"), "--sequence-length", "32", "--max-rows", "4", "--json", *CPU]
    found = []
    for model, options in ((int4, []), (sparse, ["--weights", "int4"]), (sparse, [])):
        assert main(["eval", str(model), *data, *options]) == 0
        found.append(last_json(capsys))
    assert found[0]["perplexity"] == found[1]["perplexity"] != found[2]["perplexity"]
    assert found[1]["measured"]["options"]["weights"] == "int4"


def test_generate(sparse, int4, capsys):
    prompt = ["--prompt", "1 and 2", "--max-new-tokens", "4", "--json", *CPU]
    found = []
    for model, options in ((int4, []), (sparse, ["--weights", "int4"])):
        assert main(["generate", str(model), *prompt, *options]) == 0
        found.append(last_json(capsys))
    assert found[0]["texts"] == found[1]["texts"]
    assert [one["weights"] for one in found] == ["int4", "int4"]


def test_bench(sparse, capsys):
    decode = ["bench", "decode", "--model", str(sparse), "--weights", "int4", "--dtype", "float32", "--repeats", "1"]
    assert main([*decode, "--prompt-tokens", "8", "--new-tokens", "8", "--json", *CPU]) == 0
    (row,) = last_json(capsys)["rows"]
    assert row["weights"] == "int4"
    ffn = ["bench", "ffn", "--model", str(sparse), "--weights", "int8", "--dtype", "float32", "--tokens", "1"]
    ffn += ["--sparsity", "0", "--expert-size", "8", "--repeats", "3", "--seconds", "0.1", "--backend", "auto"]
    assert main([*ffn, "--json", *CPU]) == 0
    (row,) = last_json(capsys)["rows"]
    neurons, router, ends = 3 * 64 * 32 + (64 + 64 + 32) * 4, 8 * (32 + 4) + 8 * 4, 2 * 32 * 4
    assert (row["weights"], row["bytes"]) == ("int8", neurons + router + ends)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["quantise", "{dense}", "-o", "{out}"], "sparse"),
        (["quantise", "{sparse}", "-o", "{out}", "--weights", "int8", "--text", "{text}"], "needs no data"),
        (["quantise", "{int4}", "-o", "{out}"], "the experts are int4 already"),
        (["quantise", "{sparse}", "-o", "{sparse}"], "own folder"),
        (["eval", "{dense}", "--text", "{text}", "--weights", "int8"], "sparse"),
        (["generate", "{int4}", "--prompt", "1", "--weights", "int8"], "the experts are int4 already"),
        (["generate", "{dense}", "--prompt", "1", "--weights", "int8"], "sparse"),
    ],
)
def test_refusals_are_one_line(command, message, files, sparse, int4, tmp_path, capsys):
    names = {"dense": files / "llama", "sparse": sparse, "int4": int4, "out": tmp_path / "out"}
    names["text"] = files / "text.txt"
    assert main([one.format(**names) for one in [*command, *CPU]]) == 2
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "warning" not in line)
    assert message in said
