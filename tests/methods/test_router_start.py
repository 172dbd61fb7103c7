"""Routers that start at what the dense model's experts do."""

import pytest
import torch
from tiny_training import DEPENDENT, make_dependent_, markov_blocks, sparse_llama, trainer_for
from torch.nn.functional import silu

from lte.methods.router_start import TOKENS_PER_INPUT, fit_routers_
from lte.modules.recording import sparse_layers


def batches(rows: int = 400, size: int = 50):
    blocks = markov_blocks(rows)
    return [
        {"input_ids": torch.stack([torch.as_tensor(blocks[i]["input_ids"]) for i in range(at, at + size)])}
        for at in range(0, rows, size)
    ]


def contributions(layer, x_TD):
    hidden_TF = silu(layer.gate_proj(x_TD)) * layer.up_proj(x_TD)
    return (hidden_TF * layer.down_proj.weight.norm(dim=0)).unflatten(-1, (-1, 8)).square().sum(-1).sqrt()


@pytest.mark.parametrize("padding", [False, True])
@torch.no_grad()
def test_logits_rank_experts_by_what_they_add(padding):
    model, data = sparse_llama(), batches()
    if padding:  # counts for nothing, whatever is in it
        for batch in data:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, 4), value=7)
            batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 4))
    fit_routers_(model, data, bias=2.0)
    inputs, layers = [], list(sparse_layers(model).values())
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    model(**batches(rows=50)[0])
    for layer, x_TD in zip(layers, inputs, strict=True):
        logits, found = layer.router.logits(x_TD), contributions(layer, x_TD)
        assert logits.mean() == pytest.approx(2.0, abs=0.05)
        assert logits.std() == pytest.approx(1.0, abs=0.05)
        target = found.pow(0.25)
        assert torch.corrcoef(torch.stack([logits.flatten(), target.flatten()]))[0, 1] > 0.6


@torch.no_grad()
def test_it_is_the_ridge_regression():
    """One layer against torch's least squares, on inputs so many that the ridge is nothing."""
    model, data = sparse_llama(), batches()
    layer = next(iter(sparse_layers(model).values()))
    inputs = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    fit_routers_(model, data, bias=1.0)
    hook.remove()
    x_TD = torch.cat(inputs)[: TOKENS_PER_INPUT * 33]
    x_TI = torch.cat([x_TD, torch.ones(len(x_TD), 1)], 1).double()
    should = x_TI @ torch.linalg.lstsq(x_TI, contributions(layer, x_TD).pow(0.25).double()).solution
    should = 1 + (should - should.mean()) / should.std()
    torch.testing.assert_close(layer.router.logits(x_TD).double(), should, atol=0.05, rtol=0)


def test_a_run_that_starts_so_meets_its_target(tmp_path):
    trainer = trainer_for(
        tmp_path, max_steps=80, learning_rate=1e-2, router_start="fitted", train_dataset=markov_blocks(1500)
    )
    trainer.train()
    assert trainer.evaluate(markov_blocks(100, seed=9))["eval_sparsity"] == pytest.approx(0.5, abs=0.04)


@torch.no_grad()
@pytest.mark.parametrize("kind", DEPENDENT)
def test_inputs_that_depend_on_each_other(kind):
    """Legitimate however they are: of a layer that is cut out, of a short text, with one neuron above all others."""
    model, data = sparse_llama(), batches(rows=50)
    make_dependent_(model, data, kind)
    fit_routers_(model, data, bias=2.0)
    first, second = (layer.router for layer in sparse_layers(model).values())
    for router in (first, second):
        assert router.weight.isfinite().all()
        assert router.bias.isfinite().all()
    if kind == "dead":  # nothing tells its experts apart
        assert first.bias.tolist() == pytest.approx([2.0] * first.num_experts, abs=1e-3)
        assert first.weight.abs().max() < 1e-3
    assert model(**data[0]).logits.isfinite().all()


@torch.no_grad()
def test_finite_weights_may_make_infinities():
    model = sparse_llama()
    model.model.layers[0].mlp.up_proj.weight.mul_(1e30)
    with pytest.raises(ValueError, match="what FFNs are given and give has become NaN or infinite"):
        fit_routers_(model, batches(rows=50), bias=1.0)


def test_a_start_that_is_unknown(tmp_path):
    with pytest.raises(ValueError, match="router_start is 'warm', but it is random or fitted"):
        trainer_for(tmp_path, router_start="warm")
