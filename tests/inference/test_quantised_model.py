"""Models with quantised experts: what they compute, cost and refuse, and their folders."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import relative_rms, tiny_inputs, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lte
from lte.inference import other_weights
from lte.inference.kept import _state
from lte.inference.packed import PackedLayer
from lte.modules.quantised_linear import QuantisedLinear, is_quantised
from lte.modules.recording import sparse_layers
from lte.surgery import tensor_parallel
from lte.surgery.architectures import hugging_face_generate
from lte.surgery.sites import find_sites

SOME = ["llama", "phi3", "gpt2", "opt", "bloom", "falcon"]
"""A family of each kind: gated, fused, Conv1D, no module of its own (twice), a linear class of its own."""
MOST = {"int8": 0.01, "int4": 0.15}
"""Error of the logits while the router's choice is that of the floats."""


def sparse(family="llama", mode="hard", **overrides):
    model = lte.sparsify_(tiny_model(family, **overrides), lte.LTEConfig(expert_size=8, grouping="random"))
    lte.set_mode_(model, mode)
    return model.eval()


@torch.no_grad()
def logits(model, family="llama"):
    return model(**tiny_inputs(family)).logits


def open_all_(model):
    for layer in sparse_layers(model).values():
        layer.router.bias.data.fill_(1e3)
    return model


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", SOME)
def test_every_kind_of_family(family, weights, tmp_path):
    floats = open_all_(sparse(family))
    model = copy.deepcopy(floats)
    names = {name for name, _ in model.named_modules()}
    assert lte.quantise_(model, weights) is model
    assert {name for name, _ in model.named_modules()} == names
    expected = logits(model, family)
    assert 0 < relative_rms(expected, logits(floats, family)) < MOST[weights]

    model.save_pretrained(tmp_path)
    floats.save_pretrained(tmp_path / "floats")
    small, large = ((folder / "model.safetensors").stat().st_size for folder in (tmp_path, tmp_path / "floats"))
    linears = [linear for site in find_sites(model, family) for linear in site.projections().values()]
    saved = sum(4 * linear.matrix.rows.shape[0] * linear.matrix.shape[1] - linear.matrix.nbytes for linear in linears)
    assert small == pytest.approx(large - saved, abs=1000)  # the headers name other tensors
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in loaded.state_dict().items())
    assert torch.equal(logits(loaded, family), expected)
    assert type(loaded) is type(model)

    optimised = lte.optimize_(floats, weights=weights)
    lte.optimize_(loaded)
    assert torch.equal(logits(loaded, family), logits(optimised, family))
    assert relative_rms(logits(loaded, family), expected) < 0.02  # attention is int8 now


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_layers_run_sparse_ffn_with_quantised_weights(family, monkeypatch):
    model = lte.optimize_(sparse(family), backend="reference", weights="int4")
    expected = logits(model, family)
    seen = []

    def run(layer, x_TD):
        seen.append(layer.packed.weights(layer.lte_router, layer.compensation, layer.tau))
        return lte.sparse_ffn(x_TD, seen[-1], backend="reference")

    monkeypatch.setattr(PackedLayer, "run", run)
    assert torch.equal(logits(model, family), expected)
    assert [weights.up.matrix.bits for weights in seen] == [4, 4]
    assert all(weights.quantised and weights.router.matrix.scales is None for weights in seen)


def test_other_modes_compute_with_the_quantised_weights():
    floats, model = sparse(), lte.optimize_(sparse(), weights="int8")
    for mode in ("dense", "soft"):
        lte.set_mode_(floats, mode)
        lte.set_mode_(model, mode)
        assert 0 < relative_rms(logits(model), logits(floats)) < 0.05


def test_gradients_of_inputs_are_those_of_the_numbers():
    model = lte.quantise_(sparse(), "int8")
    linear = next(one for one in model.modules() if isinstance(one, QuantisedLinear))
    x = torch.randn(3, linear.in_features, requires_grad=True)
    linear(x).sum().backward()
    weight = linear.matrix.floats(torch.float32)
    torch.testing.assert_close(x.grad, (weight.T if linear.transposed else weight).sum(0).expand(3, -1))


def test_generate_decodes_as_hugging_face(tmp_path):
    model = lte.optimize_(sparse(), weights="int4")
    prompt = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = hugging_face_generate(model)(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(lte.generate(model, prompt, **options), expected)


def test_a_kept_decoder_notices_new_weights():
    model = lte.optimize_(sparse(), weights="int8")
    before = _state(model)
    assert _state(model) == before
    layer = model.model.layers[0]
    layer.self_attn.q_proj.weight = copy.deepcopy(layer.self_attn.q_proj.weight)
    changed = _state(model)
    assert changed != before
    layer.mlp.up_proj.rows = layer.mlp.up_proj.rows.clone()
    assert _state(model) != changed


def test_compiles_without_graph_breaks():
    model = lte.optimize_(sparse(), weights="int4")
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=keep)
        assert relative_rms(compiled(**tiny_inputs("llama")).logits, logits(model)) <= 1e-5
    nodes = [node for node in graphs[0].graph.nodes if "lte.sparse_ffn" in str(node.target)]
    assert (len(graphs), len(nodes)) == (1, 2)


def test_attention_and_head_are_quantised_by_torchao():
    model = lte.optimize_(sparse(), weights="int4")
    kinds = {name: type(one).__name__ for name, one in model.named_parameters()}
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == "Int8Tensor"  # torchao has no int4 for a CPU
    others = {name for name, kind in kinds.items() if kind != "Parameter"}
    in_blocks = {name for name in kinds if "self_attn" in name and name.endswith("weight")}
    assert others == {*in_blocks, "lm_head.weight"}  # the head only on a CPU


def test_a_moved_and_cast_model_still_runs():
    model = lte.quantise_(sparse(), "int4").to(torch.bfloat16)
    linear = model.model.layers[0].mlp.down_proj
    assert (linear.rows.dtype, linear.scales.dtype) == (torch.uint8, torch.bfloat16)
    assert logits(lte.optimize_(model)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("weights", "bytes_each"), [("int8", 1 + 4 * (64 + 64 + 32) / (3 * 64 * 32)), ("int4", 0.5 + 4 / 32)]
)
def test_bytes_count_rows_and_scales(weights, bytes_each):
    floats, model = sparse(), lte.quantise_(sparse(), weights)
    ffn = sum(site.num_weights for site in find_sites(model, "llama"))
    dense = lte.cost_per_token(floats)
    found = lte.cost_per_token(model)
    assert found.weight_bytes == dense.weight_bytes - ffn * 4 + ffn * bytes_each
    assert (found.gflops, found.head_bytes) == (dense.gflops, dense.head_bytes)
    attention = dense.weight_bytes - ffn * 4
    lte.optimize_(model)
    assert 0.25 * attention < lte.cost_per_token(model).weight_bytes - ffn * bytes_each < 0.5 * attention


def test_data_keeps_the_outputs_of_the_sparse_model(caplog):
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(48, (4, 32))} for _ in range(8)]
    floats, nearest = sparse(), lte.quantise_(sparse(), "int4")
    assert "at a high loss" in caplog.text
    by_data = lte.quantise_(sparse(), "int4", data=batches)
    ids = torch.randint(48, (4, 32))
    with torch.no_grad():
        expected = floats(ids).logits
        errors = [relative_rms(model(ids).logits, expected) for model in (by_data, nearest)]
    assert errors[0] < 0.9 * errors[1]
    with pytest.raises(ValueError, match="the data is empty"):
        lte.quantise_(floats, "int4", data=[])
    assert not is_quantised(floats)


def refused(model, message, weights="int8", call=lte.quantise_):
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        call(model, weights=weights)
    assert model.state_dict().keys() == before.keys()
    assert not any(isinstance(module, PackedLayer) for module in model.modules())


@pytest.mark.parametrize("call", [lte.quantise_, lte.optimize_])
def test_what_is_refused_is_not_changed(call):
    refused(sparse(), "weights is 'int2', but it is one of int8, int4", "int2", call)
    refused(sparse(mode="soft"), "mode soft", call=call)
    refused(tiny_model("llama"), "sparse", call=call)
    refused(sparse(intermediate_size=48), "48 neurons of width 32, but int4 takes .*: take int8", "int4", call)
    damaged = sparse()
    damaged.model.layers[1].mlp.down_proj.weight.data[3, 3] = torch.nan
    refused(damaged, r"model\.layers\.1\.mlp\.down_proj has NaN", call=call)
    half = sparse()
    half.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.zeros(32, 64, dtype=torch.int8), False)
    refused(half, "quantised weights", call=call)


@pytest.mark.parametrize("call", [lte.quantise_, lte.optimize_])
def test_another_form_is_refused(call):
    model = lte.quantise_(sparse(), "int8")
    refused(model, "the experts are int8 already: load the model that they were made from", "int4", call)
    assert lte.optimize_(model, weights="int8") is model


def test_training_is_refused():
    for model in (lte.quantise_(sparse(), "int8"), lte.optimize_(sparse("opt"), weights="int8")):
        with pytest.raises(ValueError, match="cannot be trained: train the model that they were made from"):
            model.train()(**tiny_inputs(model.config.model_type))
    with pytest.raises(ValueError, match="densify the model that they were made from"):
        lte.densify(lte.quantise_(sparse(), "int8"))


def test_a_model_that_torchao_changed_is_not_saved(tmp_path):
    model = lte.optimize_(sparse(), weights="int8")
    with pytest.raises(ValueError, match=r"cannot be saved exactly: .* lte quantise"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_torchao_there_is_the_command_that_installs_it(monkeypatch):
    other_weights.torchao.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    model = sparse()
    with pytest.raises(ImportError, match=r"pip install 'lte\[quant\]'"):
        lte.optimize_(model, weights="int8")
    assert not is_quantised(model)
    other_weights.torchao.cache_clear()


def test_quantised_experts_are_not_divided(monkeypatch):
    monkeypatch.setattr(tensor_parallel, "processes_of", lambda _model: 2)
    with pytest.raises(ValueError, match="without tp_size"):
        tensor_parallel.shard_experts_(lte.quantise_(sparse(), "int8"))


def test_folders_that_stock_code_or_a_damaged_config_would_misread(tmp_path):
    lte.quantise_(sparse(), "int8").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pip install lte"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    path = Path(tmp_path / "config.json")
    config = json.loads(path.read_text())
    assert config["lte"]["weights"] == "int8"
    for weights, message in (("int2", "weights is 'int2'"), ("int4", "wrong shape|missing")):
        config["lte"]["weights"] = weights
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    del config["lte"]["weights"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
