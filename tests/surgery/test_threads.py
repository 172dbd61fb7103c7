"""One model in several threads, as servers share an encoder: each thread's pass is its own."""

import copy
import threading

import pytest
import torch
from tiny_models import SHAPES, randomise_, tiny_inputs, tiny_model

import lte
from lte.modules.recording import sparse_layers

FAMILIES = ["bert", "opt", "llama"]  # the first two select at the activation, and see the FFN's input by a hook


def sparse(family, optimised=False):
    config = lte.LTEConfig(expert_size=8, grouping="random", compensation_rank=4)
    model = lte.sparsify_(tiny_model(family), config)
    for layer in sparse_layers(model).values():
        randomise_(layer)
    lte.set_mode_(model, "hard")
    return lte.optimize_(model, "reference") if optimised else model


def other_inputs(family):
    return {name: value[:1, :5] for name, value in tiny_inputs(family).items()}


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def interrupted(model, when, mine, other):
    """Both results, where ``other`` runs as a whole in a second thread while ``mine`` is in its first FFN."""
    first = next(iter(sparse_layers(model).values()))
    here, results = threading.get_ident(), {}

    def pause(*_):
        if threading.get_ident() == here:
            second = threading.Thread(target=lambda: results.update(other=other()))
            second.start()
            second.join()

    register = first.register_forward_pre_hook if when == "before" else first.register_forward_hook
    handle = register(pause)
    results["mine"] = mine()
    handle.remove()
    return results["mine"], results["other"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("optimised", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_in_another_thread_changes_nothing(family, optimised, when):
    for model in (sparse(family, optimised), copy.deepcopy(sparse(family, optimised))):
        inputs, others = tiny_inputs(family), other_inputs(family)
        alone = [logits(model, inputs), logits(model, others)]
        together = interrupted(model, when, lambda: logits(model, inputs), lambda: logits(model, others))  # noqa: B023
        assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))


@pytest.mark.parametrize("optimised", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recording_has_its_own_threads_passes(family, optimised):
    model = sparse(family, optimised)

    def recorded(inputs):
        with lte.record_scores(model) as recording, lte.track_sparsity(model) as meter:
            found = logits(model, inputs)
        return found, torch.stack(list(recording.scores.values())), meter.overall

    inputs, others = tiny_inputs(family), other_inputs(family)
    alone = [recorded(inputs), recorded(others)]
    for found, expected in zip(
        interrupted(model, "before", lambda: recorded(inputs), lambda: recorded(others)), alone, strict=True
    ):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert found[2] == expected[2]
    watched, _ = interrupted(model, "before", lambda: recorded(inputs), lambda: logits(model, others))
    assert torch.equal(watched[1], alone[0][1])
    assert not any(layer.kept_in for layer in sparse_layers(model).values())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_blocks_have_the_same_gradients(family, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = sparse(family)
        lte.set_mode_(model, "soft")
        for module in model.modules():  # random numbers would be drawn anew
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.train()
        model.config.attention_dropout = 0.0
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": reentrant})
        options = {"use_cache": False} if SHAPES[family][0] == "CausalLM" else {}
        torch.manual_seed(0)
        model(**tiny_inputs(family), **options).logits.square().mean().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert any("router" in name for name in gradients[0])
    assert any("compensation" in name for name in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])
