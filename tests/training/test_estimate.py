"""The estimate of a run, against what PyTorch itself holds in a step."""

import pytest
import torch
from tiny_training import sparse_llama, trainer_for
from torch.autograd.graph import saved_tensors_hooks

from lte.surgery.convert import set_mode_
from lte.training.estimate import estimate, steps_of, time_steps


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}], ids=["full", "lora"])
def test_parameters_and_states_are_those_of_the_optimizer(tmp_path, options):
    trainer = trainer_for(tmp_path, **options)
    made = estimate(trainer)
    assert (made.stages.dense, made.stages.soft, made.stages.hard) == (3, 8, 1)
    assert (made.experts, made.layers) == (16, 2)
    assert sum(count for count, _ in made.parameters.values()) == sum(p.numel() for p in trainer.model.parameters())
    assert made.parameters["routers"][0] == 2 * (16 * 32 + 16)
    assert ("adapters" in made.parameters) == bool(options)
    assert made.memory["teacher"] == (0 if options else sum(p.nbytes for p in trainer.model.parameters()))
    model, optimizer = trainer.model, trainer.optimizer
    set_mode_(model, "soft")
    ids = torch.arange(3, 19)[None]
    (model(ids, labels=ids).loss + sum(p.sum() for p in model.parameters() if p.requires_grad)).backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert made.memory["optimizer"] == sum(one.nbytes for one in states)
    assert made.memory["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert made.peak == sum(made.memory.values())


def test_activations_are_what_the_backward_pass_keeps(tmp_path):
    model = sparse_llama()
    trainer = trainer_for(tmp_path, model, per_device_train_batch_size=8)
    made = estimate(trainer)
    set_mode_(model, "soft")
    model.train()
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(3, 131).view(8, 16) % 60
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids))  # noqa: F841
    expected = sum(one.untyped_storage().nbytes() for address, one in kept.items() if address not in weights)
    assert made.memory["activations"] == pytest.approx(expected, rel=0.02)
    less = estimate(trainer_for(tmp_path, sparse_llama(), gradient_checkpointing=True)).memory["activations"]
    assert less < 0.7 * made.memory["activations"]


@pytest.mark.slow
def test_steps_of_epochs(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)
    assert steps_of(trainer) == 2 * 12  # 190 rows, batches of 8
    trainer.train()
    assert trainer.state.global_step == 24


def test_an_optimizer_of_which_little_is_known_is_named(tmp_path):
    assert estimate(trainer_for(tmp_path, optim="adafactor")).unknown == "adafactor"


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(o, marks=pytest.mark.slow) for o in ({"schedule": "dense"}, {"dense_fraction": 0.0}))],
)
def test_time(tmp_path, options):
    trainer = trainer_for(tmp_path / "out", sparse_llama(), **options)
    made = estimate(trainer)
    times = time_steps(trainer, made.stages)
    steps = {name: steps for name, steps in vars(made.stages).items() if steps}
    assert times.step.keys() == steps.keys()
    expected = sum(steps[name] * seconds for name, seconds in times.step.items())
    assert expected + times.begin <= times.total < expected + 5 * times.begin + 1e-9
    assert times.peak is None
    assert not list((tmp_path / "out").iterdir())
