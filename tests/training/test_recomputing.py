"""Reentrant checkpointing leaves recorded scores without gradient: it is refused wherever it was turned on."""

from functools import partial

import pytest
import torch
from tiny_training import VOCABULARY, arguments, markov_blocks, sparse_llama
from torch.utils.checkpoint import checkpoint

import lte
from lte.training.trainer import LTETrainer


def recomputing(model, reentrant=True):
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    return model


def on_the_model(model):
    recomputing(model)


def on_one_block(model):
    recomputing(model, reentrant=False)
    model.model.layers[1]._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)


def by_default(model):
    recomputing(model)
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = checkpoint


@pytest.mark.parametrize("turn_on", [on_the_model, on_one_block, by_default])
def test_a_run_refuses_it_at_its_start(tmp_path, turn_on):
    model = sparse_llama()
    turn_on(model)
    trainer = LTETrainer(model, args=arguments(tmp_path), train_dataset=markov_blocks(16))
    with pytest.raises(ValueError, match="has reentrant gradient checkpointing") as refusal:
        trainer.train()
    assert "\n" not in str(refusal.value)
    assert trainer.state.global_step == 0


def test_other_loops_are_told_when_they_read_the_scores():
    model = recomputing(sparse_llama()).train()
    lte.set_mode_(model, "soft")
    tokens = torch.randint(VOCABULARY, (2, 8))
    with lte.record_scores(model) as recording, lte.track_sparsity(model) as meter:
        model(input_ids=tokens, use_cache=False)
        with pytest.raises(ValueError, match="have no gradient"):
            _ = recording.scores
        with torch.no_grad():
            assert len(recording.scores) == 2
    assert 0 <= meter.overall <= 1


def test_scores_are_read_without_gradient_where_none_is_due():
    tokens = torch.randint(VOCABULARY, (2, 8))
    model = sparse_llama().train()
    lte.set_mode_(model, "soft")
    with lte.record_scores(model) as recording:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
        assert not any(one.requires_grad for one in recording.scores.values())
    recomputing(model, reentrant=False)
    with lte.record_scores(model) as recording:
        model(input_ids=tokens, use_cache=False)
        assert all(one.requires_grad for one in recording.scores.values())
    recomputing(model)
    for layer in lte.modules.recording.sparse_layers(model).values():
        layer.router.requires_grad_(False)
    with lte.record_scores(model) as recording:
        model(input_ids=tokens, use_cache=False)
        assert len(recording.scores) == 2
