"""``lte sparsify --stream`` in processes of its own: with little memory, and killed in the middle."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lte
from byte_tokenizer import byte_tokenizer
from lte.cli.main import main
from lte.surgery.shards import UNFINISHED

LIMITED = """
import resource, sys
from pathlib import Path
import torch, lte, numba
from lte.cli import sparsify
from lte.cli.main import main

def data():
    return int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024

limit = data() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""
"""Runs a command with a limit on the memory that it takes besides Python and libraries.

RLIMIT_DATA counts what a process allocates. RLIMIT_AS would also count the code of libraries and files that are mapped
to be read, and a cgroup needs rights that CI does not have.
"""


def tensors(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def command(model, out, *more):
    return ["sparsify", "--model", str(model), "-o", str(out), "--expert-size", "64", "--device", "cpu", *more]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 450 MB with random weights, in one file."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    shape = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 9}
    config = LlamaConfig(**shape, num_attention_heads=8, tie_word_embeddings=False, dtype="float32")
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_size > 400e6
    return folder


def limited(folder, *argv):
    memory = (folder / "model.safetensors").stat().st_size // 3
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(memory), *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts allocations on Linux alone")
def test_a_third_of_the_checkpoint_is_enough_memory(large, tmp_path):
    refused = limited(large, *command(large, tmp_path / "whole", "--grouping", "random"))
    assert refused.returncode != 0
    assert "memory" in refused.stderr
    done = limited(large, *command(large, tmp_path / "streamed", "--stream"))
    assert done.returncode == 0, done.stderr
    assert "9 FFNs of 32 experts x 64 neurons" in done.stdout
    model = lte.sparsify_(AutoModelForCausalLM.from_pretrained(large), lte.LTEConfig(expert_size=64))
    expected, found = model.state_dict(), tensors(tmp_path / "streamed")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.slow
def test_killed_in_the_middle(large, tmp_path):
    out = tmp_path / "out"
    argv = [sys.executable, "-m", "lte.cli.main", *command(large, out, "--stream", "--grouping", "random")]
    first = out / UNFINISHED / "model-00002-of-00011.safetensors"
    process = subprocess.Popen(argv, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not first.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (out / "config.json").exists()
    before = {path.name: path.stat().st_ino for path in (out / UNFINISHED).glob("model-*.safetensors")}
    assert len(before) < 11
    digests = json.loads((out / UNFINISHED / ".journal.json").read_text())["digests"]
    subprocess.run(argv, check=True)
    after = {path.name: path.stat().st_ino for path in out.glob("*.safetensors")}
    assert len(after) == 11
    assert all(after[name] == before[name] for name in digests)
    assert not [*out.glob(".*")]


@pytest.fixture(scope="module")
def streamed(files, tmp_path_factory):
    """The same model twice: as a whole, and block by block."""
    folder = tmp_path_factory.mktemp("streamed")
    for name, more in (("whole", []), ("out", ["--stream"])):
        argv = ["sparsify", "--model", str(files / "llama"), "-o", str(folder / name), "--expert-size", "8"]
        assert main([*argv, "--grouping", "random", *more]) == 0
    return folder


def test_the_same_folder(streamed):
    whole, out = streamed / "whole", streamed / "out"
    for path in whole.iterdir():
        if path.suffix not in (".safetensors",) and path.name != "lte_training.json":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    summary = json.loads((out / "lte_training.json").read_text())
    assert summary["command"].endswith("--stream")
    assert summary["method"] == json.loads((whole / "lte_training.json").read_text())["method"]
    expected, found = tensors(whole), tensors(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_refused_in_one_line(files, tmp_path, capsys):
    argv = ["sparsify", "--model", str(files / "llama"), "-o", str(tmp_path / "out"), "--stream"]
    assert main([*argv, "--method", "cats", "--text", str(files / "text.txt")]) == 2
    error = capsys.readouterr().err
    assert "cats with these options needs data: leave --stream out" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
