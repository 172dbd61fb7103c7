"""Tensor parallelism over two processes computes what one does: all families that transformers has a plan for."""

import json
import subprocess
import sys

import pytest
import tiny_tensor_parallel
import torch

pytestmark = pytest.mark.slow

WITHIN = 1e-5
ON_CPU = pytest.mark.skipif(torch.version.cuda is not None, reason="transformers looks for GPUs in this build of torch")
ON_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(
    scope="module",
    params=[pytest.param("gloo", marks=ON_CPU), pytest.param("nccl", marks=[pytest.mark.gpu, ON_GPUS])],
)
def two(request, tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp(request.param)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, tiny_tensor_parallel.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def same_sparsity(found):
    whole, shared, apart = found
    assert shared == pytest.approx(whole, abs=1e-6)
    assert 0.3 < shared < 0.7
    assert apart < WITHIN


def test_all_families_in_all_modes(two):
    for found in two:
        assert sorted(found["families"]) == tiny_tensor_parallel.families()
        assert len(found["families"]) > 25
        for family, errors in found["families"].items():
            same_sparsity(errors.pop("sparsity"))
            assert len(errors) == 6
            assert max(errors.values()) < WITHIN, (family, errors)


def test_gradients(two):
    for found in two:
        for family, errors in found["gradients"].items():
            assert sum("router" in name for name in errors) == 4
            assert max(errors.values()) < WITHIN, (family, errors)


def test_saved_and_loaded(two):
    for found in two:
        for again in found["saved"].values():
            assert again["same weights"]
            assert again["same section"]
            assert again["whole"] == 0
            assert again["shared"] < WITHIN


def test_other_methods(two):
    for found in two:
        for name, families in found["methods"].items():
            for one in families.values():
                assert one["hard"] < WITHIN, name
                same_sparsity(one["sparsity"])
        assert found["teal"] < WITHIN


def test_however_it_is_asked_for_and_what_goes_on_from_there(two):
    for found in two:
        assert max(found["spellings"].values()) < WITHIN


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("uneven", "3 experts, which 2 processes cannot share evenly"),
        ("optimize_", "optimize_ packs whole weights"),
        ("densify", "densify copies whole weights"),
        ("sparsify_", "a conversion needs whole weights"),
        ("teal_", "a conversion needs whole weights"),
        ("prune_", "a conversion needs whole weights"),
        ("track_inputs", "counting inputs wants whole weights"),
        ("train", "LTETrainer groups and fits whole weights"),
        ("by hand", "32 of its 64 neurons"),
    ],
)
def test_refusals_are_one_line(two, call, says):
    for found in two:
        assert says in found["refusals"][call]
        assert "\n" not in found["refusals"][call]
