"""What a training run says it was: the options that change its result and are not at their default."""

import pytest
import torch

import lte
from lte.evaluation.inputs import Inputs
from lte.training.record import given_of, made_by_training


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"recipe": "default", "router_bias": 1.0, "weight_decay": 0.0, "optim": "adamw_torch_fused"}, {}),
        ({"router_bias": 2.0}, {"router_bias": 2.0}),
        ({"seed": 5, "logging_steps": 3, "save_steps": 7, "output_dir": "b", "gradient_checkpointing": True}, {}),
        ({"recipe": "paper", "eta": 0.5, "ramp": 1.0}, {"recipe": "paper", "eta": 0.5}),
        ({"recipe": "dense", "ramp": 0.3}, {"recipe": "dense"}),
        ({"target_sparsity": 0.5, "ramp": 0.5}, {"target_sparsity": 0.5}),
        ({"accelerator_config": {"split_batches": False}}, {}),
        ({"accelerator_config": {"split_batches": True}}, {"accelerator_config.split_batches": True}),
        ({"lr_scheduler_type": "polynomial"}, {}),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {}}, {"lr_scheduler_type": "linear"}),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, {"lr_scheduler_kwargs.num_cycles": 2}),
    ],
)
def test_options_that_tell_runs_apart(tmp_path, options, expected):
    args = lte.LTETrainingArguments(**{"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", **options})
    before = {name: str(value) for name, value in vars(args).items()}
    assert given_of(args) == expected
    assert {name: str(value) for name, value in vars(args).items()} == before


def test_what_is_no_training_argument(tmp_path):
    args = lte.LTETrainingArguments(str(tmp_path), use_cpu=True, report_to="none", seed=3)
    usual = {"calibration_text": (), "held_out": 0.0, "dtype": "auto"}

    def options(method, inputs, **others):
        return made_by_training("", "m", method, inputs, args, **{**usual, **others}).options

    inputs = Inputs(("a.txt",))
    assert options(lte.LTEConfig(seed=3), inputs) == options(lte.LTEConfig(seed=3), inputs, dtype=torch.float32) == {}
    found = options(lte.LTEConfig(seed=4, tau=0.4), inputs, dtype=torch.bfloat16, calibration_text=("c.txt",))
    assert found == {"method_seed": 4, "tau": 0.4, "dtype": "bfloat16", "calibration_text": ["c.txt"]}
    task = Inputs(("a.txt",), "generation", lte.DataConfig(sequence_length=8))
    assert options(lte.CATSConfig(), task, held_out=0.1) == {
        "method": "cats",
        "held_out": 0.1,
        "task": "generation",
        "sequence_length": 8,
    }
