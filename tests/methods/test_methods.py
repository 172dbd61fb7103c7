"""What every method has to do: convert, choose, save and load, cost, and be refused where it does not belong."""

import pytest
import torch
from tiny_methods import batches, converted, logits, measured
from tiny_models import SHAPES, relative_rms, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import lte
from lte.core.accounting import G
from lte.modules.recording import sparse_layers
from lte.surgery.cost import model_shape
from lte.surgery.method import Method

METHODS = {
    "moefication-oracle": lte.MoEficationConfig(expert_size=8, grouping="random", selection="oracle"),
    "moefication-mlp": lte.MoEficationConfig(expert_size=8, grouping="coactivation", fit_epochs=2),
    "moefication-similarity": lte.MoEficationConfig(expert_size=8, selection="similarity"),
    "deja-vu": lte.DejaVuConfig(fit_epochs=2, tokens=300),
    "deja-vu-groups": lte.DejaVuConfig(expert_size=8, grouping="random", selection="top_k", rank=3, fit_epochs=2),
    "cats": lte.CATSConfig(tokens=300),
    "static-pruning": lte.StaticPruningConfig(),
}
FAMILIES = ["llama", "phi3", "gpt2", "opt", "t5"]
AUTO = {"CausalLM": AutoModelForCausalLM, "MaskedLM": AutoModelForMaskedLM, "Seq2SeqLM": AutoModelForSeq2SeqLM}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_at_once_saved_and_loaded(family, name, tmp_path):
    model = converted(family, METHODS[name])
    assert {layer.mode for layer in sparse_layers(model).values()} == {"hard"}
    assert model.config.lte["mode"] == "hard"
    assert not model.training
    assert 0.3 < measured(model, batches(family)).overall < 0.7
    found = logits(model, family)
    assert relative_rms(found, logits(tiny_model(family), family)) > 1e-4
    model.save_pretrained(tmp_path)
    loaded = AUTO[SHAPES[family][0]].from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, family), found)
    assert Method.from_dict(loaded.config.lte) == METHODS[name]
    lte.set_mode_(loaded, "dense")
    assert relative_rms(logits(loaded, family), logits(tiny_model(family), family)) < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_bert(name, tmp_path):
    model = converted("bert", METHODS[name])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForMaskedLM.from_pretrained(tmp_path), "bert"), logits(model, "bert"))


@pytest.mark.parametrize("name", METHODS)
def test_bf16(name, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    lte.sparsify_(model, METHODS[name], data=batches("llama"))
    assert 0.3 < measured(model, batches("llama")).overall < 0.7
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))


D, F, E = 32, 64, 8  # of tiny models, and experts of 8
ROUTER_AND_ALWAYS = {  # weights of a layer's router; of its FFN, multiplied for every neuron: gated, plain
    "moefication-oracle": (0, 2 * D * F, D * F),
    "moefication-mlp": (E * D + E * E, 0, 0),
    "moefication-similarity": (E * D, 0, 0),
    "deja-vu": (D // 8 * (D + F), 0, 0),
    "deja-vu-groups": (3 * (D + E), 0, 0),
    "cats": (0, D * F, D * F),
    "static-pruning": (0, 0, 0),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_cost(family, name):
    gated = family != "gpt2"
    router, always_gated, always_plain = ROUTER_AND_ALWAYS[name]
    always, matrices = (always_gated, 3) if gated else (always_plain, 2)
    model = converted(family, METHODS[name], count=1)
    cost = lte.cost_per_token(model, sparsity=0.75)
    assert cost.router_gflops == 2 * 2 * router / G
    assert cost.ffn_gflops == pytest.approx(2 * 2 * (always + (matrices * D * F - always) / 4) / G)
    dense = lte.cost_per_token(tiny_model(family))
    assert lte.cost_per_token(model) == dense
    assert cost.attention_gflops == dense.attention_gflops
    assert cost.weight_bytes == round(4 * G / 2 * cost.gflops)
    assert model_shape(model).ffn_weights == (matrices * D * F,) * 2


@pytest.mark.parametrize("name", METHODS)
def test_what_is_for_lte_is_refused(name):
    model = converted("llama", METHODS[name], count=1)
    with pytest.raises(ValueError, match=r"Router, not LTE's router: its kernels cannot run it"):
        lte.optimize_(model)
    with pytest.raises(ValueError, match="the dense model again with another target_sparsity"):
        lte.calibrate_(model, batches("llama", 1), 0.4)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.fit_tokens])
def test_data_is_missing(name):
    model = tiny_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"needs data: pass sparsify_\(model, config, data=batches\)"):
        lte.sparsify_(model, METHODS[name])
    with pytest.raises(ValueError, match="data is empty"):
        lte.sparsify_(model, METHODS[name], data=[])
    assert not hasattr(model.config, "lte")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_more_data_is_read_than_needed():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield batches("llama", 1)[0]  # 42 tokens that are not padding

    lte.sparsify_(tiny_model("llama"), lte.CATSConfig(tokens=100), data=endless())
    assert len(taken) == 3


def test_without_data():
    for selection in ("oracle", "similarity"):
        method = lte.MoEficationConfig(expert_size=8, grouping="random", selection=selection)
        assert method.fit_tokens == 0
        assert measured(lte.sparsify_(tiny_model("llama"), method), batches("llama")).overall == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lte.CATSConfig(target_sparsity=0), "target_sparsity is 0, but it is the fraction of idle neurons"),
        (lambda: lte.CATSConfig(target_sparsity=50), "target_sparsity is 50"),
        (lambda: lte.CATSConfig(tokens=0), "tokens is 0"),
        (lambda: lte.MoEficationConfig(selection="best"), "selection is 'best', but it is one of mlp, similarity"),
        (lambda: lte.MoEficationConfig(grouping="best"), "grouping is 'best'"),
        (lambda: lte.MoEficationConfig(expert_size=0), "expert_size is 0"),
        (lambda: lte.MoEficationConfig(fit_epochs=0), "fit_epochs is 0"),
        (lambda: lte.DejaVuConfig(rank=0), "rank is 0"),
        (lambda: lte.DejaVuConfig(selection="mlp"), "selection is 'mlp', but it is one of threshold, top_k"),
        (lambda: lte.DejaVuConfig(fit_learning_rate=0), "fit_learning_rate is 0"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lte.MoEficationConfig(expert_size=7, selection="oracle"), "does not divide"),
        (lte.MoEficationConfig(expert_size=8, selection="oracle", target_sparsity=0.95), "leaves none of 8 experts"),
        (lte.DejaVuConfig(expert_size=32, selection="top_k", target_sparsity=0.9), "leaves none of 2 experts"),
        (lte.StaticPruningConfig(target_sparsity=0.999), "leaves none of 64 experts"),
    ],
)
def test_errors_before_the_first_change(method, message):
    model = tiny_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        lte.sparsify_(model, method, data=batches("llama", 1))
    assert not hasattr(model.config, "lte")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_fixed_fields_are_no_options():
    with pytest.raises(TypeError, match="expert_size"):
        lte.CATSConfig(expert_size=8)  # pyright: ignore
    saved = lte.CATSConfig(target_sparsity=0.7).to_dict()
    assert saved == {"method": "cats", "target_sparsity": 0.7, "tokens": 4096, "activation": None}
    with pytest.raises(
        ValueError, match="unknown option expert_size for method 'cats': it has target_sparsity, tokens, activation"
    ):
        Method.from_dict({**saved, "expert_size": 8})
    options = ["expert_size", "tau", "seed", "grouping", "compensation_rank", "target_sparsity"]
    assert list(lte.LTEConfig().to_dict()) == ["method", *options]


def test_further_fine_tuning_keeps_the_choice():
    model = converted("llama", lte.StaticPruningConfig())
    kept = model.model.layers[0].mlp.router.kept_F.clone()
    model.train()
    model(**tiny_inputs("llama"), labels=tiny_inputs("llama")["input_ids"]).loss.backward()
    gradient_FD = model.model.layers[0].mlp.gate_proj.weight.grad
    assert torch.equal(gradient_FD.abs().sum(1) > 0, kept)
