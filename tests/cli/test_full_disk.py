"""A full disk in any command: one line with the file's name, what was there before whole, nothing half written."""

import json
import resource
from contextlib import contextmanager

import pytest

from lte.cli.main import main
from processes import names
from result_rows import row, write

FORCED = ["--max-new-tokens", "2", "--max-rows", "12", "--task", "generation", "--device", "cpu"]


@contextmanager
def files_up_to(size):
    """As on a disk with so little room: what is written beyond fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def content(folder):
    return {name: (folder / name).read_bytes() for name in names(folder) if (folder / name).is_file()}


def refused(argv, size, capsys, path):
    with files_up_to(size):
        assert main([str(one) for one in argv]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"lte: error: {path} could not be written ("), line
    assert "): free some space there" in line


@pytest.fixture(scope="module")
def sparse(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse") / "model"
    assert main(["sparsify", "--model", str(files / "llama"), "-o", str(folder), "--expert-size", "8"]) == 0
    config = json.loads((folder / "config.json").read_text())
    config["lte"]["mode"] = "hard"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("size", [500, 20_000])
@pytest.mark.parametrize("command", ["sparsify", "prune"])
def test_a_model_that_is_made(files, tmp_path, capsys, command, size):
    more = ["--method", "magnitude"] if command == "prune" else ["--expert-size", "8"]
    out = tmp_path / "new" / "out"
    argv = [command, "--model", files / "llama", "-o", out, *more]
    refused(argv, size, capsys, out)
    assert names(tmp_path) == []
    assert main([str(one) for one in argv]) == 0
    before = content(out)
    refused(argv, size, capsys, out)
    assert content(out) == before


def test_calibrating_in_place(files, sparse, capsys):
    before = content(sparse)
    argv = ["calibrate", sparse, "--text", files / "text.txt", "--sequence-length", "32", "--rows", "4"]
    refused([*argv, "--target-sparsity", "0.5", "--in-place", "--device", "cpu"], 20_000, capsys, sparse)
    assert content(sparse) == before


def test_predictions(files, tmp_path, capsys):
    path = tmp_path / "predictions.jsonl"
    path.write_text("old\n")
    argv = ["eval", files / "llama", "--text", files / "prompts.jsonl", "--generate", "--predictions", path, *FORCED]
    refused(argv, 300, capsys, path)
    assert content(tmp_path) == {"predictions.jsonl": b"old\n"}


@pytest.mark.parametrize("ending", ["html", "md"])
def test_a_page(tmp_path, capsys, ending):
    rows = write(tmp_path / "rows.jsonl", [row("dense", 10), row("lte", 10.4, 0.5, 0.12)])
    page = tmp_path / f"page.{ending}"
    page.write_text("a good page")
    refused(["report", rows, "-o", page, "--format", ending], 200, capsys, page)
    assert page.read_text() == "a good page"
    assert names(tmp_path) == sorted([page.name, "rows.jsonl"])


@pytest.mark.parametrize(("share", "named"), [(0.2, "lte_teacher"), (1.3, "checkpoint-2")])
def test_a_checkpoint(files, sparse, tmp_path, capsys, share, named):
    """The teacher, or a checkpoint's optimizer: the run ends, and what was begun is taken back."""
    argv = ["train", "--model", files / "llama", "--text", files / "text.txt", "-o", tmp_path / "out"]
    argv += ["--max-steps", "4", "--save-steps", "2", "--sequence-length", "32", "--report-to", "none"]
    argv += ["--expert-size", "8", "--grouping", "random", "--device", "cpu", "--target-sparsity", "0.5"]
    refused(argv, int(share * (sparse / "model.safetensors").stat().st_size), capsys, tmp_path / "out" / named)
    assert not (tmp_path / "out" / named).exists()
    assert not [name for name in names(tmp_path) if ".lte" in name]
