"""Synthetic routers: the sparsity asked for, spread over layers, experts and tokens as in trained ones."""

import pytest
import torch
from transformers import LlamaConfig

from lte.bench.decode import random_model
from lte.bench.routing import measured_routing, random_routers_, route_
from lte.bench.shapes import FFNSize
from lte.bench.synthetic import biases, layer_targets, random_ffn, shift_to
from lte.methods.lte import LTEConfig
from lte.surgery.convert import set_mode_, sparsify_

CPU = torch.device("cpu")


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.95])
def test_layers_are_spread_as_trained_ones(sparsity):
    targets = layer_targets(32, sparsity)
    assert sum(targets) / 32 == pytest.approx(sparsity, abs=1e-4)
    if sparsity == 0.5:
        assert 0.3 < min(targets) < 0.38
        assert 0.62 < max(targets) < 0.7
    assert targets != sorted(targets)


def test_all_or_nothing():
    assert layer_targets(3, 0) == [0, 0, 0]
    logits = torch.randn(16, 8)
    assert (logits + biases(logits, 0, 0.0) > 0).all()
    assert not (logits + biases(logits, 1, 0.0) > 0).any()


@pytest.mark.parametrize("threshold", [0.0, 0.7])
@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.9])
def test_experts_and_tokens_differ(sparsity, threshold):
    generator = torch.Generator().manual_seed(0)
    weights = random_ffn(FFNSize(64, 4096, True, "silu"), 32, torch.float32, CPU, generator)
    x = torch.randn(2048, 64, generator=generator)
    logits = x @ weights.router.matrix.rows.T
    active = logits + biases(logits, sparsity, threshold) > threshold
    assert 1 - active.float().mean() == pytest.approx(sparsity, abs=0.01)
    by_expert, by_token = active.float().mean(0), active.float().mean(1)
    assert by_expert.max() - by_expert.min() > 0.1
    independent = (by_expert * (1 - by_expert)).sum().sqrt() / 128  # what chance alone would give
    assert by_token.std() > 1.5 * independent
    shifted = logits + shift_to([logits], 0.25, threshold)
    assert (shifted <= threshold).float().mean() == pytest.approx(0.25, abs=0.01)


def test_a_model_meets_the_sparsity_on_what_its_layers_see():
    sizes = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
    model = random_model(LlamaConfig(vocab_size=200, **sizes), torch.float32, CPU, seed=0)
    sparsify_(model, LTEConfig(expert_size=16, grouping="random"))
    set_mode_(model, "hard")
    random_routers_(model)
    tokens = torch.randint(200, (2, 64), generator=torch.Generator().manual_seed(0))
    for asked in (0.5, 0.8, 0.0):
        route_(model, tokens, asked)
        by_layer, union = measured_routing(model, tokens, 0)
        assert sum(by_layer) / 8 == pytest.approx(asked, abs=0.02)
        assert asked == 0 or max(by_layer) - min(by_layer) > 0.1
        assert all(a <= b for a, b in zip(union, by_layer, strict=True))
