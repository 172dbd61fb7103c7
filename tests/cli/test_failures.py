"""How commands fail: a line for bad input, a traceback for a mistake of lte, silence where nobody reads."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lte.cli.failures import UsageError, one_line
from lte.cli.main import main
from lte.cli.train import parse_train, recipe_arguments
from lte.files import NotWritten

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def fails_with(monkeypatch, error):
    def run(_):
        raise error

    monkeypatch.setattr("lte.cli.inspect.main", run)
    return main(["inspect", "x"])


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ValueError("a\nb"), 2, "a b"),
        (ImportError("pip install it"), 2, "pip install it"),
        (UsageError("no such option"), 2, "no such option"),
        (FileNotFoundError(2, "No such file", "x.txt"), 2, "[Errno 2] No such file: 'x.txt'"),
        (NotWritten("out", 28), 2, "out could not be written (No space left on device): free some space there, or"),
        (BrokenPipeError(32, "Broken pipe"), 2, "[Errno 32] Broken pipe"),  # of another pipe than stdout
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("interrupted at step 5"), 130, "interrupted at step 5"),
        (MemoryError(), 2, "out of memory (MemoryError): lower --sequence-length"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 2, "out of memory (CUDA out of memory.): lower"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "out of memory ("),
    ],
)
def test_a_line_and_a_code(monkeypatch, capsys, error, code, says):
    assert fails_with(monkeypatch, error) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lte: error: {says}")


@pytest.mark.parametrize("command", ["train", "eval", "bench"])
def test_what_to_lower_is_the_commands_own(monkeypatch, capsys, command):
    def run(_):
        raise MemoryError

    monkeypatch.setattr(f"lte.cli.{command}.main", run)
    assert main([command]) == 2
    option = {"train": "--per-device-train-batch-size", "eval": "--batch-size", "bench": "--tokens"}[command]
    assert option in capsys.readouterr().err


@pytest.mark.parametrize("error", [AssertionError("a shape"), KeyError("x"), RuntimeError("no such size"), TypeError()])
def test_a_mistake_of_ours_shows_where_and_asks_for_a_report(monkeypatch, capsys, error):
    assert fails_with(monkeypatch, error) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):")
    last = said.splitlines()[-1]
    assert last.startswith(f"lte: error: {type(error).__name__}: ")
    assert "please report it with the traceback above (lte 0" in last
    assert f"torch {torch.__version__}" in last


def test_a_traceback_of_bad_input_on_demand(monkeypatch, capsys):
    monkeypatch.setenv("LTE_DEBUG", "1")
    assert fails_with(monkeypatch, ValueError("bad")) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_message_does_not_steer_the_terminal():
    assert one_line("a\x1b[2J\n b\x00 c\u202e") == "a\ufffd[2J b\ufffd c\ufffd"


@pytest.mark.slow
def test_python_m_knows_the_errors_of_its_commands():
    command = [sys.executable, "-m", "lte.cli.main", "train", "--bogus"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("lte: error: ")
    assert len(done.stderr.splitlines()) == 1


def test_ctrl_c_while_libraries_are_imported():
    """The signal comes at a set place: some libraries swallow it elsewhere, with a bare except about an import."""
    code = (
        "import os, signal, sys, lte_start\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what runs in the background ignores it
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'transformers':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "sys.exit(lte_start.main())"
    )
    command = [sys.executable, "-c", code, "inspect", "x"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=200)
    assert (done.returncode, done.stderr) == (130, "lte: error: interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("argv", [[], ["train", "--help"], ["inspect", "MODEL"]])
def test_a_reader_that_has_gone_is_no_error(files, argv):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lte.cli.main", *argv]
    command = [str(files / "llama") if one == "MODEL" else one for one in command]
    done = subprocess.run(
        command, env=ENVIRONMENT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=200
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_json_is_printed_once_by_all_ranks(rank, lines):
    code = "from lte.cli.console import print_json, table; print_json({}); table('', ['a'], [])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=ENVIRONMENT | {"RANK": rank}, capture_output=True, text=True, check=True, timeout=200
    )
    assert done.stdout.count("{}") == lines
    assert bool(done.stdout) is bool(lines)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--warmup-ratio 0.1", "in place of --warmup-ratio use --warmup-steps, where a number below 1 is a share"),
        ("--warmup_ratio 0.1", "in place of --warmup-ratio use --warmup-steps"),
        ("--warmup-ratio=0.1", "in place of --warmup-ratio use --warmup-steps"),
        ("--evaluation-strategy steps", "in place of --evaluation-strategy use --eval-strategy"),
        ("--no-cuda", "in place of --no-cuda use --device cpu"),
    ],
)
def test_an_option_that_is_gone_names_the_one_that_came(capsys, old, new):
    assert main(["train", "--model", "m", "-o", "o", "--text", "t", *old.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert new in line


def test_a_recipe_says_no(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: no\noutput_dir: 1.10\nsave_strategy: no\neval_strategy: no\nreport_to: [on]\nbf16: no\n"
        "gradient_checkpointing: yes\nsubset: 010\ntarget_sparsity: 0.5\nseed: 7\nlr_scheduler_kwargs: {a: 2}\n"
        "text: [2024-01-01, yes]\neta: null\nrun_name: ~\n"
    )
    given = recipe_arguments(path)
    pairs = " ".join(given)
    for one in ("--model no", "--output-dir 1.10", "--save-strategy no", "--report-to on", "--bf16 False", "--seed 7"):
        assert one in pairs, one
    assert "--gradient-checkpointing True" in pairs
    assert "--text 2024-01-01 yes" in pairs
    assert given[given.index("--lr-scheduler-kwargs") + 1] == json.dumps({"a": 2})
    assert "--eta" not in given
    assert "--run-name" not in given


def test_a_recipe_with_no_is_parsed(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: m\noutput_dir: o\ntarget_sparsity: 0.5\ntext: [yes]\n"
        "save_strategy: no\nbf16: no\ngradient_checkpointing: yes\n"
    )
    options = parse_train([str(path)])
    assert options.training.save_strategy == "no"
    assert options.training.bf16 is False
    assert options.training.gradient_checkpointing is True
    assert options.data.text == ("yes",)
