"""Parameters divided by FSDP2 between two processes on the CPU, through all three stages."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import lte
from lte.modules.sharding import is_sharded, whole, whole_state
from lte.training.checks import check_sharded

SCRIPT = Path(__file__).parent / "tiny_fsdp.py"


def run(folder, ranks, **options):
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *several, str(SCRIPT), str(folder), json.dumps(options)]
    paths = os.pathsep.join([str(SCRIPT.parent), *sys.path])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, check=False, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads((folder / "run.json").read_text()), "weights": load_file(folder / "model.safetensors")}


@pytest.mark.slow
def test_divided_parameters_give_the_weights_of_divided_data(tmp_path):
    divided, whole_in_each = run(tmp_path / "fsdp", 2, fsdp=True), run(tmp_path / "ddp", 2)
    for entry, same in zip(divided["log"], whole_in_each["log"], strict=True):
        assert entry == pytest.approx(same, rel=1e-6)
    torch.testing.assert_close(*(torch.tensor(one["gradients"]) for one in (divided, whole_in_each)))
    assert divided["weights"].keys() == whole_in_each["weights"].keys()
    for name, weight in divided["weights"].items():
        torch.testing.assert_close(weight, whole_in_each["weights"][name], rtol=1e-5, atol=1e-7)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fsdp")
    assert loaded.config.lte["mode"] == "hard"
    assert loaded(torch.arange(3, 13).unsqueeze(0)).logits.isfinite().all()


@pytest.mark.slow
def test_they_give_the_losses_of_one_process(tmp_path):
    """A compensation starts by the first batch of a process, so here is none."""
    divided = run(tmp_path / "fsdp", 2, fsdp=True, tied=True, rank=0)
    alone = run(tmp_path / "one", 1, tied=True, rank=0)
    for entry, same in zip(divided["log"][:-1], alone["log"][:-1], strict=True):  # the last one has new thresholds
        for name in {"loss", "task_loss", "distillation_loss", "eta", "sparsity", "grad_norm"} & same.keys():
            assert entry[name] == pytest.approx(same[name], rel=2e-5, abs=1e-6), name
    gradients = torch.tensor(divided["gradients"])
    torch.testing.assert_close(gradients, torch.tensor(alone["gradients"]), rtol=1e-4, atol=1e-6)
    assert (gradients[3:11] > 0).all()  # of the soft stage
    assert (gradients[11:] == 0).all()
    assert divided["weights"].keys() == alone["weights"].keys()


def test_whole_parameters_stay_what_they_are():
    linear = nn.Linear(3, 2)
    weight = linear.weight
    assert not is_sharded(linear)
    with whole(linear), torch.no_grad():
        linear.weight.fill_(2.0)
    assert linear.weight is weight
    assert (weight == 2).all()
    assert torch.equal(whole_state(linear, keep=True)["weight"], weight)
    assert whole_state(linear, keep=False) == {}


def test_routers_that_are_set_on_data_need_a_whole_model(monkeypatch):
    monkeypatch.setattr("lte.training.checks.is_sharded", lambda _: True)
    options = lte.LTETrainingArguments("out", use_cpu=True, target_sparsity=0.5, report_to="none")
    for method, refused in ((lte.CATSConfig(target_sparsity=0.5), True), (lte.LTEConfig(), False)):
        trainer = SimpleNamespace(
            is_fsdp_enabled=True,
            is_deepspeed_enabled=False,
            plain=None,
            args=options,
            method=method,
            training=method.training(options),
        )
        if refused:
            with pytest.raises(ValueError, match="cats sets its routers on data"):
                check_sharded(trainer)
        else:
            check_sharded(trainer)
