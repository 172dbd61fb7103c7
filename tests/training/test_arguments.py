"""The arguments: what a schedule decides, and what is refused."""

import json
from dataclasses import asdict, replace

import pytest
from tiny_training import arguments

from lte.surgery.training_options import SCHEDULES
from lte.training.arguments import LTETrainingArguments
from lte.training.identity import options_of

REENTRANT = {"use_reentrant": True}
RENAMED = "activation_checkpointing" in LTETrainingArguments.__dataclass_fields__


def test_the_paper_literally(tmp_path):
    args = arguments(tmp_path, schedule="paper", eta=0.3)
    assert args.separability_weight == 0.5
    assert args.router_learning_rate == 1e-2
    assert args.router_weight_decay == 0.1
    assert (args.router_bias, args.temperature, args.distillation_weight) == (0, 1, 0)
    assert args.eta == 0.3
    assert args.target_sparsity is None
    assert args.get_warmup_steps(100) == 6


@pytest.mark.parametrize(("schedule", "needs"), [("default", {"target_sparsity": 0.5}), ("paper", {"eta": 1.0})])
def test_a_schedule_fills_what_is_not_given(tmp_path, schedule, needs):
    args = arguments(tmp_path, schedule=schedule, router_learning_rate=None, **needs)
    for name, value in asdict(SCHEDULES[schedule]).items():
        assert getattr(args, name) == value
    unset = {**needs, "router_learning_rate": None}
    given = arguments(tmp_path, schedule=schedule, **unset, separability_weight=0.25, temperature=3.0, router_bias=0.5)
    assert (given.separability_weight, given.temperature, given.router_bias) == (0.25, 3.0, 0.5)
    assert given.router_learning_rate == SCHEDULES[schedule].router_learning_rate


def test_a_zero_overrides_a_schedule(tmp_path):
    args = arguments(tmp_path, distillation_weight=0.0, router_bias=0.0)
    assert (args.distillation_weight, args.router_bias) == (0, 0)


@pytest.mark.parametrize("name", ["default", "paper", "dense"])
def test_the_former_name_of_the_schedule(tmp_path, name):
    given = {"paper": {"eta": 0.3}, "dense": {}, "default": {"target_sparsity": 0.5}}[name]
    former = arguments(tmp_path, recipe=name, **given)
    assert (former.schedule, former.recipe) == (name, None)
    assert options_of(former) == options_of(arguments(tmp_path, schedule=name, **given))
    assert options_of(former)["recipe"] == name
    assert replace(former, schedule="dense", eta=None, target_sparsity=None).is_dense


def test_a_dense_run_is_one_dense_stage(tmp_path):
    args = arguments(tmp_path, schedule="dense", hard_fraction=0.3)
    assert (args.dense_fraction, args.hard_fraction) == (1.0, 0.0)
    assert not arguments(tmp_path, schedule="dense", distillation_weight=0.9).distils


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"schedule": "papers"}, "default, dense, paper"),
        ({"recipe": "papers"}, "schedule is 'papers'"),
        ({"recipe": "paper", "schedule": "dense"}, "two names of one option"),
        ({"target_sparsity": 1.0}, "target_sparsity is 1.0"),
        ({"target_sparsity": 0.0}, "between 0 and 1"),
        ({"target_sparsity": 1.0}, "between 0 and 1"),
        ({"target_sparsity": 1.5}, "between 0 and 1"),
        ({"eta": 1.0}, "drop eta, or take schedule='paper'"),
        ({"schedule": "paper", "target_sparsity": 0.5, "eta": 1.0}, "has no target"),
        ({"schedule": "dense", "target_sparsity": 0.5}, "has no target"),
        ({"schedule": "paper"}, "needs an eta"),
        ({"schedule": "paper", "eta": -0.1}, "needs an eta"),
        ({"separability_floor": 0.0}, "separability_floor is 0"),
        ({"distillation_weight": 1.1}, "share in"),
        ({"distillation_weight": -0.1}, "share in"),
        ({"feature_distillation_weight": -0.1}, "at least 0"),
        ({"temperature": 0.5}, "at least 1"),
        ({"ramp": 0.0}, "above 0 and at most 1"),
        ({"sparsity_ramp": 0.0}, "above 0 and at most 1"),
        ({"sparsity_ramp": 1.5}, "above 0 and at most 1"),
        ({"dense_learning_rate": 0.0}, "dense_learning_rate is 0.0"),
        ({"ramp": 1.1}, "above 0 and at most 1"),
        ({"calibration_rows": 0}, "at least 1"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}, "only schedule='dense'"),
        ({"save_strategy": "best", "eval_strategy": "epoch", "metric_for_best_model": "loss"}, "save_strategy='best'"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": REENTRANT}, "non-reentrant"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": json.dumps(REENTRANT)}, "non-reentrant"),
        pytest.param(
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": REENTRANT},
            "non-reentrant",
            marks=pytest.mark.skipif(not RENAMED, reason="this transformers has the old name only"),
        ),
    ],
)
def test_what_is_refused(tmp_path, given, said):
    with pytest.raises(ValueError, match=said):
        arguments(tmp_path, **given)


def test_gradient_checkpointing_is_non_reentrant(tmp_path):
    given = {"preserve_rng_state": True}
    args = arguments(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=given)
    assert args.gradient_checkpointing
    assert args.gradient_checkpointing_kwargs == {"preserve_rng_state": True, "use_reentrant": False}
    assert given == {"preserve_rng_state": True}


def test_no_memory_is_pinned_on_the_cpu(tmp_path):
    assert not arguments(tmp_path).dataloader_pin_memory
