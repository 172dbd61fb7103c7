"""A linear stand-in for idle experts: by hand, in every family, packed, saved, counted, trained."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import SHAPES, relative_rms, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import lte
from lte.modules.compensation import Compensation
from lte.modules.recording import sparse_layers
from lte.ops.weights import Affine, FFNWeights, Matrix, RouterWeights
from lte.surgery.cost import cost_per_token
from lte.surgery.sites import find_sites

CONFIG = lte.LTEConfig(expert_size=8, grouping="random", compensation_rank=3)
NO_MODULE = ["opt", "bert"]
"""Families whose FFN is no module of its own: a hook on the down projection adds."""


def compensated(family="llama", mode="hard", **overrides):
    model = lte.sparsify_(tiny_model(family, **overrides), CONFIG)
    generator = torch.Generator().manual_seed(5)
    for layer in sparse_layers(model).values():
        for parameter in layer.compensation.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    lte.set_mode_(model, mode)
    return model


@torch.no_grad()
def outputs(model, family="llama"):
    return model(**tiny_inputs(family))[0]


def test_by_hand():
    one = Compensation(2, 1)
    one.compress.data = torch.tensor([[1.0, 2.0]])
    one.bias.data = torch.tensor([0.5])
    one.expand.data = torch.tensor([[3.0], [-1.0]])
    x, kept = torch.tensor([[1.0, 1.0], [0.0, 2.0]]), torch.tensor([[True, False, False, False], [True] * 4])
    assert one(x, kept).tolist() == [[0.75 * 3.5 * 3, -0.75 * 3.5], [0.0, 0.0]]
    assert one(x, torch.tensor([[0.5, 0.0], [0.25, 0.25]]))[1].tolist() == [0.75 * 4.5 * 3, -0.75 * 4.5]
    one.reset()
    assert not one(x, kept).any()
    assert one.num_weights == 4


@torch.no_grad()
def test_the_operation_adds_the_same():
    one = Compensation(8, 3)
    one.reset()
    one.bias.normal_()
    one.expand.normal_()
    up, down, router = (Matrix(torch.randn(rows, 8)) for rows in (16, 16, 4))
    weights = FFNWeights(Affine(up), Affine(down), RouterWeights(router))
    whole = replace(weights, compensation=one.weights)
    x, active = torch.randn(5, 8), torch.rand(5, 4) > 0.5
    plain, found = (lte.sparse_ffn(x, each, active, backend="reference") for each in (weights, whole))
    assert torch.equal(found, plain + one(x, active))
    assert relative_rms(found, plain) > 1e-2


@pytest.mark.parametrize("mode", ["dense", "soft", "hard"])
@pytest.mark.parametrize("family", SHAPES)
@torch.no_grad()
def test_it_is_added_to_each_ffns_output(family, mode):
    model = compensated(family, mode)
    sites = find_sites(model, model.config.model_type)
    site = sites[0]
    layer, seen = site.installed, {"x": [], "h": [], "y": []}
    hooks = [
        site.first.register_forward_pre_hook(lambda _, args: seen["x"].append(args[0])),
        site.down.register_forward_pre_hook(lambda _, args: seen["h"].append(args[0])),
    ]
    module = site.down if site.family.site is None else layer
    hooks.append(module.register_forward_hook(lambda _m, _a, y: seen["y"].append(y.clone())))  # Falcon adds to it
    outputs(model, family)
    for hook in hooks:
        hook.remove()
    seen = {name: values[0] for name, values in seen.items()}
    layer.compensation, kept = None, layer.compensation
    plain = site.down(seen["h"])  # its hook has nothing to add
    if mode == "dense":
        assert torch.allclose(seen["y"], plain, atol=1e-6)
        return
    scores = layer.router(seen["x"])
    weights = scores if mode == "soft" else scores > 0.5
    assert relative_rms(seen["y"], plain + kept(seen["x"], weights)) <= 1e-5
    assert relative_rms(seen["y"], plain) > 1e-3


@pytest.fixture
def calls(monkeypatch):
    """How often the module itself ran."""
    counted, forward = [], Compensation.forward

    def counting(self, x_TD, weights_TE):
        counted.append(self)
        return forward(self, x_TD, weights_TE)

    monkeypatch.setattr(Compensation, "forward", counting)
    return counted


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
@torch.no_grad()
def test_packed_computes_the_same(family, backend, calls):
    if backend == "cpu":
        pytest.importorskip("numba")
    model = compensated(family)
    expected = outputs(model, family)
    assert len(calls) == len(sparse_layers(model))
    lte.optimize_(model, backend)
    calls.clear()
    assert relative_rms(outputs(model, family), expected) <= 1e-5
    with lte.track_sparsity(model) as meter:
        assert relative_rms(outputs(model, family), expected) <= 1e-5
    assert not calls  # it was sparse_ffn that added it
    assert 0.1 < meter.overall < 0.9
    for layer in sparse_layers(model).values():
        layer.compensation.expand.zero_()
    assert relative_rms(outputs(model, family), expected) > 1e-3


class Wrapper(torch.nn.Module):
    """What peft may put around a module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return 2 * self.inner(*args)


@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_packed_honours_hooks_and_wrappers(family, calls):
    model = compensated(family)
    optimised = lte.optimize_(copy.deepcopy(model), backend="reference")
    layer, packed = (next(iter(sparse_layers(each).values())) for each in (model, optimised))
    handles = [
        layer.compensation.register_forward_hook(lambda _m, _a, y: 3 * y),
        packed.compensation.register_forward_hook(lambda _m, _a, y: 3 * y),
    ]
    expected = outputs(model, family)
    calls.clear()
    assert relative_rms(outputs(optimised, family), expected) <= 1e-5
    assert calls == [packed.compensation]
    for handle in handles:
        handle.remove()
    assert relative_rms(outputs(optimised, family), expected) > 1e-3
    assert len(calls) == 1
    for one in (layer, packed):
        one.compensation.forward = Wrapper(type(one.compensation).forward.__get__(one.compensation))
    assert relative_rms(outputs(optimised, family), outputs(model, family)) <= 1e-5
    for one in (layer, packed):
        del one.compensation.forward
        one.compensation = Wrapper(one.compensation)
    assert relative_rms(outputs(optimised, family), outputs(model, family)) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_packed_compiles_without_graph_breaks(family, calls):
    model = compensated(family)
    expected = outputs(model, family)
    lte.optimize_(model)
    calls.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_rms(compiled(**tiny_inputs(family))[0], expected) <= 1e-5
    assert not calls


@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_it_saves_and_loads(family, tmp_path):
    model = compensated(family)
    model.save_pretrained(tmp_path)
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path)
    assert loaded.config.lte["compensation_rank"] == 3
    assert torch.equal(outputs(loaded, family), outputs(model, family))
    assert torch.equal(outputs(lte.densify(model), family), outputs(_dense(model), family))


def _dense(model):
    lte.set_mode_(model, "dense")
    return model


def test_its_weights_are_charged():
    plain = lte.sparsify_(tiny_model("llama"), lte.LTEConfig(expert_size=8, grouping="random"))
    more = compensated()
    d_model, layers = more.config.hidden_size, more.config.num_hidden_layers
    found = cost_per_token(more, 0.5).router_gflops - cost_per_token(plain, 0.5).router_gflops
    assert found == pytest.approx(2 * layers * 2 * 3 * d_model / 2**30)
    assert cost_per_token(more).gflops == cost_per_token(plain).gflops  # a dense model runs none


def test_a_rank_below_nothing_is_refused():
    with pytest.raises(ValueError, match="compensation_rank is -1, but a rank is 0"):
        lte.LTEConfig(compensation_rank=-1)
