import copy
from collections import Counter

import pytest
import torch
from tiny_models import SHAPES, relative_rms, tiny_inputs, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import lte
from lte.inference import packed
from lte.inference.packed import activation_name
from lte.modules.recording import sparse_layers
from lte.surgery.sites import find_sites

LAYERS = 2
SOME = ["llama", "phi3", "gpt2", "opt", "bloom", "falcon"]
"""A family of each kind: gated, fused, Conv1D, no module of its own (twice), a linear class of its own."""


def sparse(family="llama", mode="hard", **overrides):
    model = lte.sparsify_(tiny_model(family, **overrides), lte.LTEConfig(expert_size=8, grouping="random"))
    lte.set_mode_(model, mode)
    return model


@torch.no_grad()
def logits(model, family="llama"):
    return model(**tiny_inputs(family)).logits


@pytest.fixture
def calls(monkeypatch):
    """How often ``sparse_ffn`` ran, by backend."""
    counted = Counter()

    def counting(x, weights, active, backend):
        counted[backend] += 1
        return lte.sparse_ffn(x, weights, active, backend)

    monkeypatch.setattr(packed, "sparse_ffn", counting)
    return counted


@pytest.mark.parametrize("family", SHAPES)
def test_every_family_computes_the_same(family, calls):
    model = sparse(family)
    with lte.track_sparsity(model) as before:
        expected = logits(model, family)
    assert lte.optimize_(model, backend="reference") is model
    assert relative_rms(logits(model, family), expected) <= 1e-5
    assert calls["reference"] == len(sparse_layers(model))
    with lte.track_sparsity(model) as after:
        assert relative_rms(logits(model, family), expected) <= 1e-5
    assert after.by_layer == before.by_layer
    assert 0.1 < after.overall < 0.9


def test_other_modes_still_work(calls):
    for family in SOME:
        model = sparse(family)
        optimised = lte.optimize_(copy.deepcopy(model), "reference")
        for mode in ("dense", "soft"):
            lte.set_mode_(model, mode)
            lte.set_mode_(optimised, mode)
            assert relative_rms(logits(optimised, family), logits(model, family)) <= 1e-5
    assert not calls


def storage_bytes(model):
    return sum({s.data_ptr(): s.nbytes() for p in model.parameters() for s in [p.untyped_storage()]}.values())


@pytest.mark.parametrize("family", SOME)
def test_packing_is_a_memory_layout(family):
    model = sparse(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parameters, size = dict(model.named_parameters()), storage_bytes(model)
    lte.optimize_(model, "reference")
    assert storage_bytes(model) == size
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameters[name] and torch.equal(after[name], before[name]) for name in before)
    for site in find_sites(model, family):
        layer = site.module(site.family.site or site.family.act)
        weights = layer.packed.weights(layer.router, layer.tau)
        assert all(weights.arguments()[name].is_contiguous() for name in ("up", "down"))
        assert weights.gate is None or weights.gate.is_contiguous()


@pytest.mark.parametrize("family", SOME)
def test_saves_and_reloads_bit_equal(family, tmp_path):
    model = lte.optimize_(sparse(family), "reference")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    lte.optimize_(loaded, "reference")
    assert torch.equal(logits(loaded, family), logits(model, family))


@pytest.mark.parametrize("family", SOME)
def test_compiles_without_graph_breaks(family):
    model = lte.optimize_(sparse(family), "reference")
    lte.optimize_(model, "auto")
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=keep)
        assert relative_rms(compiled(**tiny_inputs(family)).logits, logits(model, family)) <= 1e-5
    assert len(graphs) == 1
    nodes = [node for node in graphs[0].graph.nodes if "lte.sparse_ffn" in str(node.target)]
    assert len(nodes) == LAYERS


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.Mish(), nn.PReLU(), nn.ReLU6()])
def test_an_activation_is_known_by_what_it_computes(act):
    names = {"SiLU()": "silu", "GELU(approximate='none')": "gelu", "GELU(approximate='tanh')": "gelu_tanh"}
    assert activation_name(act) == {**names, "ReLU()": "relu"}.get(str(act))
