"""``lte calibrate`` in process, on tiny models."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import lte
from lte.cli.main import main
from lte.evaluation.record import SUMMARY
from lte.modules.recording import sparse_layers
from lte.report.curves import gather
from lte.report.results import read_results
from lte.surgery.loading import load_model, load_tokenizer
from result_rows import row, write

SHORT = ["--sequence-length", "16", "--device", "cpu"]


def save_sparse(files, name, head, folder, mode="hard"):
    """A sparse model whose routers differ from each other, saved."""
    model = lte.sparsify_(load_model(str(files / name), head), lte.LTEConfig(expert_size=8, tau=0.4))
    for layer in sparse_layers(model).values():
        layer.router.weight.data.mul_(20)
    lte.set_mode_(model, mode)
    model.save_pretrained(folder)
    load_tokenizer(str(files / name)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sparse(files, tmp_path_factory):
    return save_sparse(files, "llama", "causal", tmp_path_factory.mktemp("sparse") / "llama")


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("target", [0.3, 0.7])
def test_calibrate(files, sparse, tmp_path, capsys, target):
    before, out = content(sparse), tmp_path / "new" / "out"
    given = ["--text", str(files / "text.txt"), *SHORT, "--batch-size", "16"]
    options = ["--target-sparsity", str(target), "-o", str(out), "--rows", "70", "--json"]
    assert main(["calibrate", str(sparse), *given, *options]) == 0
    printed = capsys.readouterr()
    assert content(sparse) == before
    assert "layers after: " in printed.out
    found = json.loads(printed.out.splitlines()[-1])
    assert found["after"]["sparsity"] == pytest.approx(target, abs=0.01)
    assert (found["rows"], found["rows_measured"]) == (70, 70)
    assert found["before"]["sparsity"] == pytest.approx(0.5, abs=0.15)
    assert found["before"]["perplexity"] > 1
    assert (found["shift"] > 0) == (found["after"]["sparsity"] > found["before"]["sparsity"])
    old, new = (load_file(folder / "model.safetensors") for folder in (sparse, out))
    assert old.keys() == new.keys()
    assert {name for name in old if not torch.equal(old[name], new[name])} == {
        name for name in old if name.endswith("router.bias")
    }
    was = json.loads(before["config.json"])["lte"]
    assert json.loads((out / "config.json").read_text())["lte"] == {**was, "target_sparsity": target}
    assert main(["eval", str(out), *given, "--json"]) == 0
    assert last_json(capsys)["sparsity"] == pytest.approx(target, abs=0.01)


def test_in_place_and_with_little_data(files, tmp_path, capsys):
    folder = save_sparse(files, "llama", "causal", tmp_path / "model")
    text = tmp_path / "short.txt"
    text.write_text("1 and 2 make 3, 3 and 4 make 7, 7 and 8 make 15.")
    given = ["calibrate", str(folder), "--text", str(text), *SHORT, "--target-sparsity", "0.6", "--in-place", "--json"]
    assert main(given) == 0
    found = last_json(capsys)
    assert (found["rows"], found["rows_measured"], found["output"]) == (1, 1, str(folder))
    assert main(given) == 0  # what was calibrated can be calibrated again
    assert abs(last_json(capsys)["shift"]) < 0.5


def test_what_was_measured_before_is_a_run_of_its_own(files, sparse, tmp_path, capsys):
    data, folder = ["--text", str(files / "text.txt"), *SHORT], shutil.copytree(sparse, tmp_path / "model")
    trained = {"command": "lte train -o model", "seed": 3, "recipe": "default", "steps": {"soft": 2}}
    summary = row("lte", 12, 0.5) | trained | {"method": {"method": "lte"}}
    (folder / SUMMARY).write_text(json.dumps(summary))
    lines = []
    for target in ("0.2", "0.8", "0.8"):
        assert main(["eval", str(folder), *data, "--json"]) == 0
        lines.append(last_json(capsys))
        assert main(["calibrate", str(folder), *data, "--target-sparsity", target, "--in-place"]) == 0
    assert lines[0]["trained_by"] == "lte train -o model"
    assert lines[2]["seed"] == 3
    path = write(tmp_path / "rows.jsonl", lines)
    ((task,), (kept,)) = (gather(read_results([one]).measurements) for one in (path, folder / SUMMARY))
    assert len(task.curves[0].points) == 3
    assert main(["calibrate", str(folder), *data, "--target-sparsity", "0.5", "-o", str(tmp_path / "other")]) == 0
    assert main(["eval", str(tmp_path / "other"), *data, "--json"]) == 0
    elsewhere = last_json(capsys)
    assert elsewhere["steps"] == {"soft": 2}
    assert elsewhere["trained_by"].startswith("lte train -o model && lte calibrate")
    assert "--in-place" not in kept.curves[0].points[0].setting  # training measured its own thresholds


@pytest.mark.parametrize(
    ("name", "head", "task", "text"),
    [("t5", "seq2seq", "generation", "prompts.jsonl"), ("bert", "classification", "classification", "classes.jsonl")],
)
def test_padded_rows(files, tmp_path, capsys, name, head, task, text):
    folder = save_sparse(files, name, head, tmp_path / "model")
    given = ["--text", str(files / text), "--task", task, *SHORT, "--target-sparsity", "0.6", "--json"]
    given += ["--class-names", "even", "odd"] if head == "classification" else []
    assert main(["calibrate", str(folder), *given, "-o", str(tmp_path / "out")]) == 0
    found = last_json(capsys)
    assert found["after"]["sparsity"] == pytest.approx(0.6, abs=0.03)
    assert (found["after"]["accuracy"] is None) == (task == "generation")


def test_what_is_refused(files, sparse, tmp_path, capfd):
    before, out = content(sparse), tmp_path / "out"
    soft = save_sparse(files, "llama", "causal", tmp_path / "soft", "soft")
    short = tmp_path / "short.txt"
    short.write_text("one row of text alone")
    text, target, to = ["--text", files / "text.txt"], ["--target-sparsity", "0.5"], ["-o", out]
    for argv, said in [
        ([sparse, *text, *to], "target-sparsity"),
        ([sparse, *text, "--target-sparsity", "much", *to], "much"),
        *(([sparse, *text, "--target-sparsity", share, *to], "between 0 and 1") for share in ("0", "1", "50", "nan")),
        ([sparse, *text, *target], "-o FOLDER"),
        ([sparse, *text, *target, "--in-place", *to], "not both"),
        ([sparse, *text, *target, "-o", f"{sparse}/../{sparse.name}"], "the model's own folder"),
        (["org/name", *text, *target, "--in-place"], "no folder"),
        ([sparse, *text, *target, "--rows", "0", *to], "rows is 0"),
        ([sparse, *text, *target, "--batch-size", "0", *to], "batch_size"),
        ([sparse, *target, *to], "no data"),
        ([sparse, "--text", tmp_path / "none.txt", *target, *to], "no such file"),
        ([sparse, "--text", short, *target, *to], "one row"),
        ([files / "llama", *text, *target, *to], "lte.sparsify_"),
        ([soft, *text, *target, *to], "in mode soft"),
    ]:
        assert main(["calibrate", *(str(one) for one in argv), *SHORT]) == 2
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("lte: error: ")
        assert said in lines[0], lines[0]
    assert content(sparse) == before
    assert not out.exists()
