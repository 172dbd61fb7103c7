"""CATS: thresholds worked out by hand, met on data, and taken on the right projection."""

import pytest
import torch
from tiny_methods import batches, converted, measured
from tiny_models import tiny_inputs, tiny_model

import lte
from lte.methods.cats import ActivationRouter
from lte.methods.cuts import sample


def test_the_router_by_hand():
    router = ActivationRouter(4)
    router.cut.fill_(0.5)
    assert router(torch.tensor([[0.4, -0.6, 0.5, 2.0]])).int().tolist() == [[0, 1, 0, 1]]


@torch.no_grad()
def test_one_layer_by_hand():
    """A token, a layer: the half of the neurons with the larger |act(gate)| is used, whatever up says."""
    inputs = {"input_ids": tiny_inputs("llama")["input_ids"][:1, :1]}
    seen = {}
    dense = tiny_model("llama", num_hidden_layers=1)
    mlp = dense.model.layers[0].mlp
    mlp.gate_proj.register_forward_pre_hook(lambda _module, args: seen.update(x=args[0]))
    dense(**inputs)
    fired_F = mlp.act_fn(mlp.gate_proj(seen["x"])).flatten()
    cut = fired_F.abs().sort().values[31]
    hidden_F = (fired_F * mlp.up_proj(seen["x"]).flatten()) * (fired_F.abs() > cut)
    expected = mlp.down_proj(hidden_F)
    model = lte.sparsify_(tiny_model("llama", num_hidden_layers=1), lte.CATSConfig(), data=[inputs])
    assert model.model.layers[0].mlp.router.cut == cut
    assert torch.allclose(model.model.layers[0].mlp(seen["x"]).flatten(), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_without_a_gate_it_is_up(family):
    model = converted(family, lte.CATSConfig())
    name, layer = next((n, m) for n, m in model.named_modules() if hasattr(m, "router"))
    seen = {}
    layer.router.register_forward_hook(lambda _module, args, chosen: seen.update(fired=args[0], chosen=chosen))
    down = model.get_submodule(name.replace("activation_fn", "fc2") if family == "opt" else f"{name}.c_proj")
    down.register_forward_pre_hook(lambda _module, args: seen.update(hidden=args[0]))
    model(**tiny_inputs(family))
    assert torch.equal(seen["chosen"], seen["fired"].abs() > layer.router.cut)
    assert torch.equal(seen["hidden"], seen["fired"] * seen["chosen"])


@pytest.mark.parametrize("target", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "mt5", "bert"])
def test_the_sparsity_is_met_in_every_layer(family, target):
    model = converted(family, lte.CATSConfig(target_sparsity=target))
    by_layer = measured(model, batches(family)).by_layer
    assert by_layer == pytest.approx([target] * len(by_layer), abs=0.01)


def test_what_is_idle_is_not_missed_by_relu():
    model = converted("opt", lte.CATSConfig(target_sparsity=0.3))  # half of the neurons are 0
    assert {layer.cut.item() for name, layer in model.named_modules() if name.endswith("router")} == {0.0}


def test_a_threshold_from_a_sample_of_the_neurons(monkeypatch):
    monkeypatch.setattr("lte.methods.cuts._SAMPLE", 5000)
    model = converted("llama", lte.CATSConfig(tokens=320))  # 320 * 64 values, every 5th
    assert measured(model, batches("llama")).by_layer == pytest.approx([0.5, 0.5], abs=0.03)


def test_more_tokens_than_there_are_are_all_of_them():
    model = converted("llama", lte.CATSConfig(tokens=10**9))
    assert measured(model, batches("llama")).by_layer == pytest.approx([0.5, 0.5], abs=0.005)


def test_a_sample_does_not_keep_what_it_is_of():
    values = torch.rand(64, 1 << 14)
    assert sample(values, 64).untyped_storage().nbytes() < values.untyped_storage().nbytes() / 2
