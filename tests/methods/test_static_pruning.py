"""Static pruning: which neurons stay, worked out by hand."""

import pytest
import torch
from tiny_methods import batches, converted, logits, measured
from tiny_models import relative_rms, tiny_model

import lte


@pytest.mark.parametrize("target", [0.25, 0.5])
def test_the_same_neurons_for_every_token(target):
    model = converted("llama", lte.StaticPruningConfig(target_sparsity=target))
    assert measured(model, batches("llama")).by_layer == [target, target]
    with torch.no_grad(), lte.record_scores(model) as recording:
        model(**batches("llama")[3])
    for scores in recording.scores.values():
        assert (scores == scores[0, 0]).all()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_importance_by_hand(family):
    """Mean |h| over the tokens that are not padding, times the length of what the neuron adds."""
    dense, data = tiny_model(family), batches(family)
    ffn = dense.model.layers[0].mlp if family == "llama" else dense.transformer.h[0].mlp
    down = ffn.down_proj if family == "llama" else ffn.c_proj
    sums, seen = torch.zeros(64), {}
    down.register_forward_pre_hook(lambda _module, args: seen.update(hidden=args[0]))
    for batch in data:
        dense(**batch)
        sums += seen["hidden"][batch["attention_mask"].bool()].abs().sum(0)
    lengths_F = down.weight.norm(dim=0 if family == "llama" else 1)
    best = (sums * lengths_F).argsort(descending=True)[:16]
    model = converted(family, lte.StaticPruningConfig(target_sparsity=0.75))
    ffn = model.model.layers[0].mlp if family == "llama" else model.transformer.h[0].mlp
    assert ffn.router.kept_F.nonzero().flatten().tolist() == sorted(best.tolist())


@torch.no_grad()
def test_neurons_that_do_nothing_go_first():
    model = tiny_model("llama", mlp_bias=False)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, ::2] = 0
    expected = logits(model, "llama")
    lte.sparsify_(model, lte.StaticPruningConfig(), data=batches("llama"))
    assert model.model.layers[0].mlp.router.kept_F[1::2].all()
    assert relative_rms(logits(model, "llama"), expected) < 1e-6
