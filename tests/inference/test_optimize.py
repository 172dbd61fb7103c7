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
        weights = layer.packed.weights(layer.router, layer.compensation, layer.tau)
        assert all(tensor.is_contiguous() for name, tensor in weights.named_tensors() if name.endswith("rows"))


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


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_exports_sparse(family):
    model = lte.optimize_(sparse(family)).eval()
    inputs = tiny_inputs(family)
    with torch.no_grad():
        program = torch.export.export(model, (), {**inputs, "use_cache": False})
        found = program.module()(**inputs, use_cache=False).logits
    assert sum("lte.sparse_ffn" in str(node.target) for node in program.graph.nodes) == LAYERS
    assert relative_rms(found, logits(model, family)) <= 1e-5


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.Mish(), nn.PReLU(), nn.ReLU6()])
def test_an_activation_is_known_by_what_it_computes(act):
    names = {"SiLU()": "silu", "GELU(approximate='none')": "gelu", "GELU(approximate='tanh')": "gelu_tanh"}
    assert activation_name(act) == {**names, "ReLU()": "relu"}.get(str(act))


def refused(model, said, **options):
    before = {name: (id(p), p.stride()) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=said) as error:
        lte.optimize_(model, **options)
    assert "\n" not in str(error.value)
    assert {name: (id(p), p.stride()) for name, p in model.named_parameters()} == before


def test_refusals_leave_the_model_as_it_was():
    refused(sparse(), "backend is 'cuda'", backend="cuda")
    refused(tiny_model("llama"), "call lte.sparsify_")
    refused(sparse(mode="dense"), "in mode dense.*train it")
    refused(sparse(mode="soft"), "in mode soft.*set_mode_")
    mixed = sparse("t5").bfloat16()
    mixed.decoder.block[1].layer[2].DenseReluDense.wo.float()
    refused(mixed, r"decoder.*wi bfloat16.*wo float32.*model.float\(\)")
    quick = sparse(hidden_act="quick_gelu")
    refused(quick, "QuickGELUActivation is not one of lte.sparse_ffn")
    quantised = sparse()
    quantised.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.zeros(32, 8, dtype=torch.int8), False)
    refused(quantised, "quantised weights")


def test_a_weight_of_another_class_is_refused():
    class Quantised(torch.Tensor):
        pass

    model = sparse()
    down = model.model.layers[1].mlp.down_proj
    down.weight = nn.Parameter(down.weight.detach().as_subclass(Quantised))
    refused(model, "keeps its weight as a Quantised")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_adapters_before_are_refused_and_after_are_used(family):
    peft = pytest.importorskip("peft")
    targets = {"llama": ["up_proj", "down_proj"], "phi3": ["gate_up_proj"], "opt": ["fc1", "fc2"]}[family]
    config = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0, init_lora_weights=False)
    plain, model = sparse(family), lte.optimize_(sparse(family), "reference")
    torch.manual_seed(0)
    expected = peft.get_peft_model(plain, config).eval()
    refused(expected, "merge adapters first")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config).eval()
    assert relative_rms(logits(adapted, family), logits(expected, family)) <= 1e-5
    merged = adapted.merge_and_unload()
    assert relative_rms(logits(merged, family), logits(expected, family)) <= 1e-5


@pytest.mark.parametrize("family", SOME)
def test_gradients_and_training_take_the_modules_own_path(family, calls):
    model = sparse(family)
    optimised = lte.optimize_(copy.deepcopy(model), "reference")

    def gradients(one, training):
        torch.manual_seed(0)  # of dropout
        loss = one.train(training)(**tiny_inputs(family)).logits.square().sum()
        return torch.autograd.grad(loss, [site.down.weight for site in find_sites(one, family)])

    for training in (False, True):
        torch.testing.assert_close(gradients(optimised, training), gradients(model, training), rtol=1e-4, atol=1e-3)
    assert not calls
    optimised.eval()
    logits(optimised, family)
    assert calls["reference"] == LAYERS


@pytest.mark.parametrize("family", SOME)
def test_casts_copies_and_new_weights_are_seen(family, calls):
    model = sparse(family)
    optimised = copy.deepcopy(lte.optimize_(copy.deepcopy(model), "reference"))
    assert relative_rms(logits(optimised, family), logits(model, family)) <= 1e-5
    other = sparse(family)
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    optimised.load_state_dict(other.state_dict())
    assert relative_rms(logits(optimised, family), logits(other, family)) <= 1e-5
    optimised.load_state_dict(model.state_dict(), assign=True)
    assert relative_rms(logits(optimised, family), logits(model, family)) <= 1e-5
    assert relative_rms(logits(optimised.double(), family), logits(model.double(), family)) <= 1e-5
    assert calls["reference"] == 4 * LAYERS


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_hooks_on_projections_are_honoured(family):
    model = lte.optimize_(sparse(family), "reference")
    site = find_sites(model, family)[0]
    expected, seen = logits(model, family), []
    with site.down.register_forward_hook(lambda _m, args, _y: seen.append(args[0].shape[-1])):
        assert relative_rms(logits(model, family), expected) <= 1e-5
    assert seen == [site.d_ff]


def test_autocast_gives_what_it_gave():
    model = sparse()
    optimised = lte.optimize_(copy.deepcopy(model), "reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(optimised), logits(model))


def test_a_changed_tau_and_a_changed_backend_count(calls):
    model, same = sparse(), sparse()
    lte.optimize_(lte.optimize_(model, "auto"), "reference")
    for tau in (0.4, 0.6, 0.0, 1.0):
        for one in (model, same):
            for layer in sparse_layers(one).values():
                layer.tau = tau
        assert relative_rms(logits(model), logits(same)) <= 1e-5
    assert calls == {"reference": 4 * LAYERS}


def test_a_named_backend_that_cannot_run_raises():
    model = lte.optimize_(sparse(), "triton")
    with pytest.raises(ValueError, match="backend 'triton' cannot run here"):
        logits(model)


def test_the_temperature_is_folded_in():
    model = sparse()
    for layer in sparse_layers(model).values():
        layer.router.temperature.fill_(3.0)
        layer.tau = 0.6
    expected = logits(model)
    lte.optimize_(model, "reference")
    assert relative_rms(logits(model), expected) <= 1e-5
    assert all(layer.router.temperature == 1 for layer in sparse_layers(model).values())
