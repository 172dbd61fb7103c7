"""Deja Vu: labels and predictor worked out by hand, and that the predictor learns."""

import pytest
import torch
from tiny_methods import agreement, batches, converted, measured
from tiny_models import tiny_inputs, tiny_model

import lte
from lte.methods.deja_vu import LowRankRouter
from lte.methods.post_hoc import most_active


def test_labels_are_the_most_active_neurons():
    hidden_TF = torch.tensor([[0.1, -3.0, 2.0, 0.0], [0.0, 0.0, 0.5, 0.0]])
    assert most_active(hidden_TF, 4, 2).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 0]]  # 0 is never active
    assert most_active(hidden_TF, 2, 1).int().tolist() == [[1, 0], [0, 1]]  # 3.002 and 2


def test_the_predictor_is_a_low_rank_linear_map():
    router = LowRankRouter(2, 3, rank=1)
    with torch.no_grad():
        router.down.copy_(torch.tensor([[1.0, -1.0]]))
        router.up.copy_(torch.tensor([[2.0], [0.0], [-1.0]]))
        router.bias.copy_(torch.tensor([0.0, 0.5, 0.0]))
        router.cut.fill_(0.5)
    x_TD = torch.tensor([[3.0, 1.0], [0.0, 1.0]])
    assert router.values(x_TD).tolist() == [[4.0, 0.5, -2.0], [-2.0, 0.5, 1.0]]
    assert router(x_TD).int().tolist() == [[1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
def test_the_threshold_meets_the_sparsity_in_each_layer(target):
    model = converted("llama", lte.DejaVuConfig(target_sparsity=target, fit_epochs=3))
    assert measured(model, batches("llama")).by_layer == pytest.approx([target] * 2, abs=0.01)


def test_top_k_meets_it_for_every_token():
    model = converted("gpt2", lte.DejaVuConfig(selection="top_k", target_sparsity=0.75, fit_epochs=1))
    with torch.no_grad(), lte.record_scores(model) as recording:
        model(**tiny_inputs("gpt2"))
    assert all((scores.sum(-1) == 16).all() for scores in recording.scores.values())


def test_the_predictor_learns():
    """It finds the more active half of the neurons more often with training than with hardly any."""
    found = {}
    for epochs, rate in ((1, 1e-5), (60, 1e-2)):
        method = lte.DejaVuConfig(selection="top_k", rank=16, fit_epochs=epochs, fit_learning_rate=rate)
        found[epochs] = agreement(converted("llama", method), "llama", lambda hidden_TF: most_active(hidden_TF, 64, 32))
    assert found[1] == pytest.approx(0.5, abs=0.03)
    assert found[60] > 0.7


@pytest.mark.parametrize("method", [lte.DejaVuConfig, lte.MoEficationConfig])
def test_predictors_that_diverge_are_not_kept(method):
    with pytest.raises(ValueError, match=r"layers.0.*NaN or infinite: give a lower fit_learning_rate than 1e\+30"):
        converted("llama", method(expert_size=8, fit_learning_rate=1e30, fit_epochs=2))


def test_neurons_are_not_moved():
    model = converted("llama", lte.DejaVuConfig(fit_epochs=1), count=1)
    dense = tiny_model("llama").state_dict()
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items() if "router" not in name)
