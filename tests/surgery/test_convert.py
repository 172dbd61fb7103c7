import copy
import pickle

import pytest
import torch
import transformers
from tiny_models import SHAPES, relative_rms, tiny_config, tiny_inputs, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lte
from lte.modules.recording import sparse_layers
from lte.modules.sparse_ffn import SparseActivation, SparseFFN
from lte.surgery import architectures, convert, experts
from lte.surgery.convert import install_routers_
from lte.surgery.sites import find_sites

CONFIG = lte.LTEConfig(expert_size=8, grouping="random")


@torch.no_grad()
def logits(model, family="llama"):
    return model(**tiny_inputs(family)).logits


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}, type(model), copy.deepcopy(model.config)


def is_as_it_was(model, state):
    weights, model_class, config = state
    now = model.state_dict()
    return (
        type(model) is model_class
        and type(model.config) is type(config)
        and model.config.to_dict() == config.to_dict()
        and now.keys() == weights.keys()
        and all(torch.equal(now[name], value) for name, value in weights.items())
        and not any(module._forward_pre_hooks for module in model.modules())
    )


def test_it_returns_the_same_model_with_the_same_parameters():
    model = tiny_model("llama")
    parameters = {name: id(value) for name, value in model.named_parameters()}
    assert lte.sparsify_(model, CONFIG) is model
    now = {name: id(value) for name, value in model.named_parameters() if ".router." not in name}
    assert now == parameters
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LTELlamaForCausalLM"


def test_the_config_it_was_made_from_is_left_alone():
    config = tiny_config("llama")
    first, second = LlamaForCausalLM(config), LlamaForCausalLM(config)
    lte.sparsify_(first, CONFIG)
    assert type(config).__name__ == "LlamaConfig"
    assert not hasattr(config, "lte")
    lte.sparsify_(second, lte.LTEConfig(expert_size=16, grouping="random"))
    lte.set_mode_(second, "hard")
    assert (first.config.lte["expert_size"], first.config.lte["mode"]) == (8, "dense")
    assert (second.config.lte["expert_size"], second.config.lte["mode"]) == (16, "hard")


def test_all_parts_go_on_sharing_their_config():
    model = lte.sparsify_(tiny_model("llama"), CONFIG)
    assert model.model.config is model.config
    assert model.model.layers[0].self_attn.config is model.config
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"


def test_routers_come_from_the_seed():
    def routers(seed):
        method = lte.LTEConfig(expert_size=8, grouping="random", seed=seed)
        layers = sparse_layers(lte.sparsify_(tiny_model("llama"), method)).values()
        return [layer.router.weight for layer in layers]

    first, again, other = routers(0), routers(0), routers(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_the_global_random_state_is_left_alone():
    model = tiny_model("llama")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    lte.sparsify_(model, CONFIG)
    assert torch.equal(torch.rand(1), expected)


def test_training_mode_gradients_and_freezing_are_kept():
    model = tiny_model("llama").train()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    lte.sparsify_(model, CONFIG)
    assert all(module.training for module in model.modules())
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    lte.sparsify_(evaluated := tiny_model("opt"), CONFIG)
    assert not any(module.training for module in evaluated.modules())


def test_neurons_move_as_the_grouping_says():
    model = tiny_model("llama")
    gate = model.model.layers[0].mlp.gate_proj.weight.clone()
    lte.sparsify_(model, lte.LTEConfig(expert_size=8, grouping="kmeans", seed=3))
    labels = lte.balanced_kmeans(gate, 8, 3)
    for expert in range(8):
        assert torch.equal(
            model.model.layers[0].mlp.gate_proj.weight[8 * expert : 8 * expert + 8], gate[labels == expert]
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "t5", "phi3"])
def test_coactivation_grouping_runs_on_data(family):
    model = tiny_model(family)
    expected = logits(model, family)
    model.train()
    data = [tiny_inputs(family, rows=3, length=9), tiny_inputs(family)]
    data[0]["attention_mask"][1, 4:] = 0
    lte.sparsify_(model, lte.LTEConfig(expert_size=8, grouping="coactivation"), data=iter(data))
    assert model.training
    assert relative_rms(logits(model.eval(), family), expected) <= 1e-6
    assert not any(site.down._forward_pre_hooks for site in find_sites(model, family))


def test_ungrouped_neurons_stay_and_no_data_is_read():
    model = tiny_model("llama")
    gate = model.model.layers[0].mlp.gate_proj.weight.clone()
    method = lte.LTEConfig(expert_size=8, grouping="coactivation")
    install_routers_(model, method)
    assert torch.equal(model.model.layers[0].mlp.gate_proj.weight, gate)
    assert len(sparse_layers(model)) == len(model.model.layers)
    with pytest.raises(ValueError, match="needs data"):
        lte.sparsify_(tiny_model("llama"), method)


def test_coactivation_leaves_padding_out():
    batch = tiny_inputs("llama", rows=2, length=9)
    batch["attention_mask"][1, 4:] = 0
    model = tiny_model("llama")
    sites = find_sites(model, "llama")
    padded = experts._record_neurons(model, sites, [batch])
    apart = experts._record_neurons(
        model, sites, [{"input_ids": batch["input_ids"][:1]}, {"input_ids": batch["input_ids"][1:, :4]}]
    )
    assert [part.shape for part in padded] == [(9 + 4, 64)] * 2
    assert all(relative_rms(a, b) < 1e-2 for a, b in zip(padded, apart, strict=True))


def failing(message="no"):
    def progress(sites):
        yield from list(sites)[:1]
        raise ValueError(message)

    return progress


@pytest.mark.parametrize(
    ("family", "method", "options", "message"),
    [
        ("llama", lte.LTEConfig(expert_size=7), {}, "expert_size 7 does not divide d_ff 64"),
        ("llama", lte.LTEConfig(expert_size=8, grouping="coactivation"), {}, "needs data"),
        ("llama", lte.LTEConfig(expert_size=8, grouping="coactivation"), {"data": []}, "data is empty"),
        ("opt", lte.LTEConfig(expert_size=7), {}, "does not divide"),
        ("t5", CONFIG, {"progress": failing("stopped")}, "stopped"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(family, method, options, message):
    model = tiny_model(family)
    state = state_of(model)
    with pytest.raises(ValueError, match=message):
        lte.sparsify_(model, method, **options)
    assert is_as_it_was(model, state)
    lte.sparsify_(model, CONFIG)


def test_nan_weights_are_found_before_the_first_change():
    model = tiny_model("llama")
    model.model.layers[1].mlp.gate_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        lte.sparsify_(model, lte.LTEConfig(expert_size=8, grouping="kmeans"))
    assert not hasattr(model.config, "lte")
    assert not any(isinstance(module, SparseFFN) for module in model.modules())


def test_sparse_already():
    model = lte.sparsify_(tiny_model("llama"), CONFIG)
    with pytest.raises(ValueError, match="sparse already"):
        lte.sparsify_(model, CONFIG)


def test_unknown_family():
    config = transformers.MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"unknown model family 'mamba'.*lte\.register_family"):
        lte.sparsify_(model, CONFIG)


def test_weights_on_meta():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(ValueError, match="meta device"):
        lte.sparsify_(model, CONFIG)


def test_wrapped_projections():
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp

    class Wrapped(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear, self.weight = linear, linear.weight

        def forward(self, x):
            return self.linear(x)

    mlp.up_proj = Wrapped(mlp.up_proj)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj is a .*Wrapped.*merge_and_unload"):
        lte.sparsify_(model, CONFIG)


def test_quantised_projections():
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised weights"):
        lte.sparsify_(model, CONFIG)
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="quantised weights"):
        lte.sparsify_(model, CONFIG)


def test_weights_shared_between_layers():
    model = tiny_model("llama")
    model.model.layers[1].mlp.gate_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    with pytest.raises(ValueError, match="shares FFN weights"):
        lte.sparsify_(model, CONFIG)


@pytest.mark.parametrize("extra", [nn.LayerNorm(64), nn.Dropout(0.1), nn.Parameter(torch.zeros(1))])
def test_parts_of_an_ffn_that_the_row_does_not_name(extra):
    model = tiny_model("llama")
    model.model.layers[1].mlp.inner = extra
    with pytest.raises(ValueError, match="names no role for inner"):
        lte.sparsify_(model, CONFIG)
    model.model.layers[1].mlp.inner = nn.Dropout(0.0) if isinstance(extra, nn.Module) else None
    lte.sparsify_(model, CONFIG)


def test_a_model_that_quantised_loading_has_marked(tmp_path):
    model = tiny_model("llama")
    expected = logits(model)
    model.config.quantization_config = {"quant_method": "gguf"}
    model.hf_quantizer, model.is_quantized = object(), True
    lte.sparsify_(model, CONFIG)
    model.half().float()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(loaded.config, "quantization_config")
    assert relative_rms(logits(loaded), expected) < 1e-2  # it was in fp16 once


def test_half_precision_after_conversion():
    model = lte.sparsify_(tiny_model("llama"), CONFIG)
    lte.set_mode_(model, "hard")
    expected = logits(model)
    for convert_ in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16)):
        changed = convert_(copy.deepcopy(model))
        assert relative_rms(logits(changed).float(), expected) < 0.1
    assert pickle.loads(pickle.dumps(model.half())).dtype == torch.float16


def test_modes():
    model = lte.sparsify_(tiny_model("opt"), CONFIG)
    for mode in ("soft", "hard", "dense"):
        lte.set_mode_(model, mode)
        assert {layer.mode for layer in sparse_layers(model).values()} == {mode}
        assert model.config.lte["mode"] == mode
    with pytest.raises(ValueError, match="mode is 'fast'"):
        lte.set_mode_(model, "fast")
    assert model.config.lte["mode"] == "dense"
    with pytest.raises(ValueError, match="sparsify_"):
        lte.set_mode_(tiny_model("opt"), "hard")


def test_what_is_replaced():
    kinds = {"llama": SparseFFN, "gpt2": SparseFFN, "opt": SparseActivation, "bert": SparseActivation}
    for family, kind in kinds.items():
        model = lte.sparsify_(tiny_model(family), CONFIG)
        assert {type(layer) for layer in sparse_layers(model).values()} == {kind}
    gpt2 = lte.sparsify_(tiny_model("gpt2"), CONFIG)
    assert isinstance(gpt2.transformer.h[0].mlp.c_fc, Conv1D)


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "t5"])
def test_any_head(family, head, tmp_path):
    auto = getattr(transformers, f"AutoModelFor{head}")
    model = tiny_model(family, head=head)
    inputs = tiny_inputs(family)
    inputs.pop("decoder_input_ids", None)
    if family == "t5" and head == "SequenceClassification":
        inputs["input_ids"][:, -1] = model.config.eos_token_id
    with torch.no_grad():
        expected = model(**inputs)[0]
        lte.sparsify_(model, CONFIG)
        assert relative_rms(model(**inputs)[0], expected) <= 1e-6
        lte.set_mode_(model, "hard")
        model.save_pretrained(tmp_path)
        assert torch.equal(auto.from_pretrained(tmp_path)(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt", "bert"])
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_compiled_in_one_graph(family, mode):
    model = lte.sparsify_(tiny_model(family), CONFIG)
    lte.set_mode_(model, mode)
    expected = logits(model, family)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    inputs = tiny_inputs(family) | ({"use_cache": False} if SHAPES[family][0] == "CausalLM" else {})
    with torch.no_grad():
        assert relative_rms(compiled(**inputs).logits, expected) <= 1e-6


@pytest.mark.slow
def test_a_compiled_model_follows_its_mode():
    model = lte.sparsify_(tiny_model("llama"), CONFIG)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for mode in ("dense", "hard", "soft"):
            lte.set_mode_(model, mode)
            found = compiled(**tiny_inputs("llama"), use_cache=False).logits
            assert relative_rms(found, logits(model)) <= 1e-6


def test_failure_to_make_a_class_leaves_the_model_as_it_was(monkeypatch):
    def broken(base):
        raise TypeError("no")

    monkeypatch.setattr(convert, "lte_model_class", broken)
    model = tiny_model("llama")
    state = state_of(model)
    with pytest.raises(TypeError):
        lte.sparsify_(model, CONFIG)
    assert is_as_it_was(model, state)
    assert architectures.MODEL_TYPE == "lte"


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_densify_gives_a_stock_model_of_the_same_function(family, tmp_path):
    dense = tiny_model(family)
    model = lte.sparsify_(copy.deepcopy(dense), CONFIG)
    wanted = logits(model, family)
    lte.set_mode_(model, "hard")
    before = state_of(model)
    plain = lte.densify(model)
    assert (type(plain), type(plain.config)) == (type(dense), type(dense.config))
    assert plain.state_dict().keys() == dense.state_dict().keys()
    assert torch.equal(logits(plain, family), wanted)
    weights, model_class, config = before
    assert (type(model), model.config.to_dict()) == (model_class, config.to_dict())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(type(dense).from_pretrained(tmp_path), family), wanted)
    lte.sparsify_(plain, CONFIG)  # it can be converted again


def test_densify_needs_a_sparse_model_and_keeps_its_dtype():
    with pytest.raises(ValueError, match="no sparse FFN"):
        lte.densify(tiny_model("llama"))
    assert lte.densify(lte.sparsify_(tiny_model("llama").bfloat16(), CONFIG)).dtype == torch.bfloat16
