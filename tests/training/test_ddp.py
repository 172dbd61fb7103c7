"""Two processes on the CPU, through all three stages."""

import json
import math
import os
import subprocess
import sys

import pytest
import tiny_training
import torch

pytestmark = pytest.mark.slow


def run_two(folder, **options):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, tiny_training.__file__, str(folder)]
    environment = {**os.environ, "TINY_OPTIONS": json.dumps(options)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        {**json.loads((folder / f"run-{rank}.json").read_text()), "weights": torch.load(folder / f"weights-{rank}.pt")}
        for rank in (0, 1)
    ]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_two(tmp_path_factory.mktemp("two"))


def test_both_end_with_the_same_weights(two):
    one, other = (run["weights"] for run in two)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert all(value.isfinite().all() for value in one.values())
    cuts = [value for name, value in one.items() if name.endswith(".cut")]
    assert len(cuts) == 8
    assert all(cut > 0 for cut in cuts)


def test_both_measure_and_steer_alike(two):
    one, other = two
    assert (one["eta"], one["integral"]) == (other["eta"], other["integral"])
    assert one["integral"] != 0
    logged = [entry for entry in one["logs"] if "sparsity" in entry]
    assert len(logged) == 9  # soft and hard steps
    for entry, same in zip(logged, (e for e in other["logs"] if "sparsity" in e), strict=True):
        for name in ("eta", "sparsity", "sparsity/layer_01", "task_loss", "efficiency_loss", "near_tau"):
            assert entry[name] == same[name], name
        assert math.isfinite(entry["loss"])
        both = (entry["sparsity/layer_00"] + entry["sparsity/layer_01"]) / 2
        assert entry["sparsity"] == pytest.approx(both, abs=1e-5)


def test_adapters_of_both_are_merged_alike(tmp_path):
    one, other = (run["weights"] for run in run_two(tmp_path, lora_rank=4))
    assert not any("lora" in name for name in one)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    frozen = "model.embed_tokens.weight"
    assert torch.equal(one[frozen], tiny_training.dense_llama().state_dict()[frozen])
