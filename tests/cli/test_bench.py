"""``lte bench`` in process, on tiny models on the CPU."""

import json
import subprocess

import pytest
import torch
from transformers import LlamaForCausalLM

from lte.bench import ffn as bench_ffn
from lte.bench import parity
from lte.cli.main import main
from lte.cli.options import DeviceOptions
from lte.evaluation.environment import commit

FFN = ["bench", "ffn", "--backend", "reference", "--device", "cpu", "--expert-size", "8", "--repeats", "3"]
FFN += ["--sparsity", "0", "0.5", "--tokens", "1", "3", "--dtype", "float32"]
DECODE = ["bench", "decode", "--backend", "reference", "--device", "cpu", "--expert-size", "8", "--repeats", "1"]
DECODE += ["--dtype", "float32", "--prompt-tokens", "8", "--new-tokens", "8"]
TRAIN = ["bench", "train", "--device", "cpu", "--expert-size", "8", "--batch", "2", "--sequence-length", "16"]
FIELDS = {"bench", "command", "device", "versions", "commit", "copy_gb_per_s", "rows"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(bench_ffn, "cache_bytes", lambda device: 2**16)
    for part in ("ffn", "decode"):
        monkeypatch.setattr(f"lte.cli.bench_{part}.memory_bandwidth", lambda device: 10.0)


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_ffn(files, tmp_path, capsys):
    output, plot = tmp_path / "new" / "ffn.jsonl", tmp_path / "ffn.png"
    given = [*FFN, "--model", str(files / "llama"), "--json", "-o", str(output), "--plot", str(plot)]
    assert main(given) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert found.keys() == {*FIELDS, "crossovers"}
    assert found["command"].startswith("lte bench ffn --backend reference")
    assert found["crossovers"]["float32"].keys() == {"0.0", "0.5"}
    assert "torch" in found["versions"]
    assert [row["tokens"] for row in found["rows"]] == [1, 1, 3, 3]
    assert "speed-up" in printed.out
    assert printed.err.count("dense us") == 4  # rows as they come
    assert main(given) == 0
    assert [json.loads(line).keys() for line in output.read_text().splitlines()] == [found.keys()] * 2
    assert list(tmp_path.glob("new/*")) == [output]
    assert plot.stat().st_size > 10_000


def test_a_wrong_backend_fails_and_shows_no_time(files, monkeypatch, capsys):
    right = parity.sparse_ffn
    monkeypatch.setattr(parity, "sparse_ffn", lambda *args, **kwargs: 1.1 * right(*args, **kwargs))
    assert main([*FFN, "--model", str(files / "llama"), "--json"]) == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert all("parity red" in row["error"] and "lte_us" not in row for row in found["rows"])
    assert "parity red" in printed.err
    assert "dense us " not in printed.err


def test_a_run_cut_short_keeps_its_rows(files, monkeypatch, tmp_path):
    def rows(grid):
        yield {"tokens": 1, "error": "none"}
        raise KeyboardInterrupt

    monkeypatch.setattr("lte.cli.bench_ffn.bench_ffn", rows)
    assert main([*FFN, "--model", str(files / "llama"), "-o", str(tmp_path / "r.jsonl")]) == 130
    assert len(json.loads((tmp_path / "r.jsonl.partial").read_text())["rows"]) == 1


def test_decode(files, capsys, tmp_path):
    plot = str(tmp_path / "decode.png")
    given = ["--model", str(files / "llama"), "--sparsity", "0.5", "--batch", "1", "2", "--json", "--plot", plot]
    assert main([*DECODE, *given]) == 0
    found = last_json(capsys)
    assert found.keys() == FIELDS
    assert [row["batch"] for row in found["rows"]] == [1, 2]
    assert all(row["lte_ms"] > 0 and row["backend"] == "reference" for row in found["rows"])


def test_decode_with_another_attention(files, capsys, monkeypatch):
    asked = []
    real = LlamaForCausalLM.set_attn_implementation
    monkeypatch.setattr(LlamaForCausalLM, "set_attn_implementation", lambda *args: asked.append(args[1]) or real(*args))
    given = ["--model", str(files / "llama"), "--sparsity", "0.5", "--attention", "eager", "--json"]
    assert main([*DECODE, *given]) == 0
    (row,) = last_json(capsys)["rows"]
    assert row["attention"] == "eager"
    assert asked == ["eager"] * 3  # dense in two precisions, and sparse


def test_decode_a_trained_model(files, tmp_path, capsys):
    folder = str(tmp_path / "out")
    given = ["train", "--model", str(files / "llama"), "--text", str(files / "text.txt"), "-o", folder]
    given += ["--target-sparsity", "0.5", "--max-steps", "8", "--sequence-length", "32", "--expert-size", "8"]
    assert main([*given, "--device", "cpu", "--save-strategy", "no", "--report-to", "none"]) == 0
    capsys.readouterr()
    assert main([*DECODE, "--model", folder, "--json"]) == 0
    (row,) = last_json(capsys)["rows"]
    assert row["sparsity_asked"] is None
    assert 0.1 < row["sparsity"] < 0.9
    assert main([*DECODE, "--model", folder, "--sparsity", "0.5"]) == 2


@pytest.mark.slow
def test_train(files, capsys):
    assert main([*TRAIN, "--model", str(files / "llama"), "--steps", "2", "--json"]) == 0
    found = last_json(capsys)
    assert found.keys() == FIELDS
    assert len(found["rows"]) == 4
    assert all(row["ratio"] == pytest.approx(row["lte_ms"] / row["dense_ms"]) for row in found["rows"])
    assert all(row["begin_s"] > 0 for row in found["rows"])


@pytest.mark.slow
def test_train_adapters(files, capsys):
    given = ["--lora-rank", "4", "--dtype", "bfloat16", "--bf16", "--gradient-checkpointing", "--loss-in-pieces"]
    given += ["--model", str(files / "llama"), "--variant", "default", "--json"]
    assert main([*TRAIN, "--steps", "2", *given]) == 0
    (row,) = last_json(capsys)["rows"]
    assert (row["lora_rank"], row["dtype"], row["loss_in_pieces"]) == (4, "bfloat16", True)
    assert row["begin_steps"] == pytest.approx(1e3 * row["begin_s"] / row["lte_ms"])


def test_a_picture_that_fails_costs_no_result(files, monkeypatch, tmp_path, capsys):
    def fail(*_args):
        raise OSError("disk full")

    monkeypatch.setattr("lte.cli.bench_report.plot_speed", fail)
    given = ["--model", str(files / "llama"), "--json", "-o", str(tmp_path / "r.jsonl")]
    assert main([*FFN, *given, "--plot", str(tmp_path / "a.png")]) == 2
    assert json.loads((tmp_path / "r.jsonl").read_text()) == last_json(capsys)


def test_commit_is_of_a_checkout_that_lte_is_part_of(monkeypatch, tmp_path):
    def git(*given):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *given], check=True, capture_output=True)

    file = tmp_path / "lte" / "__init__.py"
    file.parent.mkdir()
    file.touch()
    (tmp_path / "other.py").touch()
    monkeypatch.setattr("lte.evaluation.environment.__file__", str(file.parent / "evaluation" / "environment.py"))
    git("init")
    git("add", "other.py")
    git("commit", "-m", "without lte")
    assert commit() is None
    git("add", "lte")
    git("commit", "-m", "with lte")
    found = commit()
    assert found
    assert not found.endswith("+")
    file.write_text("1")
    assert commit() == f"{found}+"


def test_an_indexed_gpu_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "empty", lambda *_size, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cuda:1", "cuda", "cpu"):
        DeviceOptions(name).resolve()
    assert chosen == [torch.device("cuda:1")]


@pytest.mark.parametrize("part", ["ffn", "decode", "train"])
def test_help(part, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", part, "--help"])
    assert not stop.value.code
    assert f"usage: lte bench {part}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["bench", "all"], "ffn, decode, train"),
        (["bench", "ffn", "--shape", "llama9"], "smollm2-135m"),
        (["bench", "ffn", "--sparsity", "1.5"], "between 0"),
        (["bench", "ffn", "--tokens", "0"], "at least 1"),
        (["bench", "ffn", "--repeats", "0"], "repeats is [0]"),
        (["bench", "ffn", "--compensation-rank", "-1"], "a rank is 0"),
        (["bench", "train", "--graphs"], "give --compile too"),
        (["bench", "ffn", "--plot", "none/a.png"], "no folder none"),
        (["bench", "decode", "--plot", "a.jpg"], "ends in .png"),
        (["bench", "decode", "-o", "."], "is a folder"),
        (["bench", "train", "-o", "none/"], "is a folder"),
        (["bench", "ffn", "--expert-size", "7"], "divide"),
        (["bench", "ffn", "--model", "./none"], "no such folder"),
        (["bench", "ffn", "--device", "gpu"], "gpu"),
        (["bench", "decode", "--new-tokens", "2"], "at least 8"),
        (["bench", "decode", "--backend", "none"], "backend"),
        (["bench", "train", "--steps", "0"], "at least 1"),
        (["bench", "train", "--plot", "a.png"], "no picture"),
    ],
)
def test_bad_input(argv, said, capfd):
    assert main(argv) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
