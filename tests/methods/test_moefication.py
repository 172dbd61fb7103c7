"""MoEfication's three selections on cases small enough to work out by hand."""

import pytest
import torch
from tiny_methods import agreement, batches, converted, logits, measured
from tiny_models import relative_rms, tiny_model

import lte
from lte.methods.moefication import MLPRouter, OracleRouter, SimilarityRouter


def test_oracle_takes_the_longest_experts():
    router = OracleRouter(3, k=2)
    hidden_TF = torch.tensor([[3.0, -4.0, 0.0, 5.5, -1.0, 1.0], [0.0, 0.0, 0.1, 0.0, 0.0, 0.2]])
    assert torch.allclose(router.values(hidden_TF), torch.tensor([[5.0, 5.5, 2**0.5], [0.0, 0.1, 0.2]]))
    assert router(hidden_TF).tolist() == [[True, True, False], [False, True, True]]


def test_similarity_is_the_cosine_with_the_centre():
    router = SimilarityRouter(2, 3, k=1)
    with torch.no_grad():
        router.start(torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]]))
    x_TD = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.1]])
    assert torch.allclose(router.values(x_TD[1]), torch.tensor([0.0, 0.8, 0.0]))
    assert router(x_TD).int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_centres_are_mean_directions_of_the_gate_rows():
    model = lte.sparsify_(tiny_model("llama"), lte.MoEficationConfig(expert_size=8, selection="similarity"))
    mlp = model.model.layers[1].mlp
    rows_FD = mlp.gate_proj.weight / mlp.gate_proj.weight.norm(dim=1, keepdim=True)
    centre_D = rows_FD[16:24].mean(0)
    assert torch.allclose(mlp.router.weight[2], centre_D / centre_D.norm(), atol=1e-6)


def test_mlp_starts_as_similarity():
    mlp, similarity = MLPRouter(4, 3, k=1), SimilarityRouter(4, 3, k=1)
    centres_ED, x_TD = torch.eye(3, 4), torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mlp.start(centres_ED)
        similarity.start(centres_ED)
    assert torch.allclose(mlp.values(x_TD), similarity.values(x_TD).tanh())
    assert torch.equal(mlp(x_TD), similarity(x_TD))


@pytest.mark.parametrize("target", [0.25, 0.5, 0.75])
def test_every_token_uses_the_same_number(target):
    method = lte.MoEficationConfig(expert_size=8, selection="oracle", grouping="random", target_sparsity=target)
    model = lte.sparsify_(tiny_model("opt"), method)
    assert measured(model, batches("opt")).by_layer == [target, target]


def test_the_trained_router_finds_what_the_oracle_finds():
    """On data it was trained on, it agrees with the oracle more often than similarity does."""
    found = {}
    for selection in ("mlp", "similarity"):
        method = lte.MoEficationConfig(expert_size=8, grouping="random", selection=selection, fit_epochs=60)
        found[selection] = agreement(converted("llama", method), "llama", OracleRouter(8, k=4))
    assert found["mlp"] > 0.05 + found["similarity"]
    assert found["similarity"] > 0.5


def test_the_same_seed_gives_the_same_model():
    method = lte.MoEficationConfig(expert_size=8, grouping="random", fit_epochs=3)
    assert torch.equal(logits(converted("llama", method), "llama"), logits(converted("llama", method), "llama"))


def test_the_oracle_hurts_least_on_relu():
    """A ReLU model with experts of one neuron, half of them 0: leaving those out changes nothing."""
    method = lte.MoEficationConfig(expert_size=1, grouping="random", selection="oracle", target_sparsity=0.1)
    model = lte.sparsify_(tiny_model("opt"), method)
    assert relative_rms(logits(model, "opt"), logits(tiny_model("opt"), "opt")) < 1e-5
