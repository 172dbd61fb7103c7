"""ReLUfication: the activation is swapped, saved and loaded, and what it makes 0 is idle and not missed."""

import pytest
import torch
from tiny_methods import batches, logits, measured
from tiny_models import SHAPES, relative_rms, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.activations import ReLUSquaredActivation

import lte
from lte.surgery.method import Method
from lte.surgery.sites import find_sites

AUTO = {"CausalLM": AutoModelForCausalLM, "MaskedLM": AutoModelForMaskedLM, "Seq2SeqLM": AutoModelForSeq2SeqLM}


@torch.no_grad()
def test_one_ffn_by_hand():
    model = tiny_model("llama")
    lte.relufy_(model)
    mlp, x_TD = model.model.layers[0].mlp, torch.randn(3, 32)
    expected = mlp.down_proj(mlp.gate_proj(x_TD).clamp_min(0) * mlp.up_proj(x_TD))
    assert torch.allclose(mlp(x_TD), expected)
    lte.relufy_(model, "relu2")
    expected = mlp.down_proj(mlp.gate_proj(x_TD).clamp_min(0).square() * mlp.up_proj(x_TD))
    assert torch.allclose(model.model.layers[0].mlp(x_TD), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2", "opt", "gpt_neox", "bert", "t5", "mt5", "bart"])
def test_a_stock_model_loads_as_it_was_saved(family, tmp_path):
    model, config = tiny_model(family), tiny_model(family).config
    before, mine = logits(model, family), model.config
    undo = lte.relufy_(model)
    found = logits(model, family)
    assert mine.to_dict() == config.to_dict()  # the object that the user holds
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AUTO[SHAPES[family][0]].from_pretrained(tmp_path), family), found)
    undo()
    assert torch.equal(logits(model, family), before)
    assert model.config is mine


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_what_is_zero_is_idle_and_not_missed(activation, tmp_path):
    """Asked for little, the thresholds stay 0: the natural sparsity, here about a half."""
    swapped = tiny_model("llama")
    lte.relufy_(swapped, activation)
    method = lte.ReLUficationConfig(target_sparsity=0.1, activation=activation)
    model = lte.sparsify_(tiny_model("llama"), method, data=batches("llama"))
    assert relative_rms(logits(model, "llama"), logits(swapped, "llama")) < 1e-6
    zero = [[], []]
    for index, site in enumerate(find_sites(swapped, "llama")):
        site.first.register_forward_hook(
            lambda _module, _args, gate, index=index: zero[index].append((gate <= 0)[mask[0]].float().mean(-1))
        )
    mask = [None]
    for batch in batches("llama"):
        mask[0] = batch["attention_mask"].bool()
        swapped(**batch)
    expected = [torch.cat(one).mean().item() for one in zero]
    assert measured(model, batches("llama")).by_layer == pytest.approx(expected, abs=1e-5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
    assert Method.from_dict(loaded.config.lte) == method


def test_more_than_that_by_a_threshold():
    model = lte.sparsify_(tiny_model("llama"), lte.ReLUficationConfig(target_sparsity=0.8), data=batches("llama"))
    assert measured(model, batches("llama")).by_layer == pytest.approx([0.8, 0.8], abs=0.01)


def test_moefication_on_top():
    method = lte.MoEficationConfig(expert_size=8, selection="oracle", activation="relu2")
    model = lte.sparsify_(tiny_model("llama"), method)
    assert isinstance(model.model.layers[0].mlp.act_fn, ReLUSquaredActivation)
    assert model.config.hidden_act == "relu2"
    assert measured(model, batches("llama")).overall == 0.5


def test_an_error_leaves_the_activation():
    model = tiny_model("llama")
    before = logits(model, "llama")
    with pytest.raises(ValueError, match="does not divide"):
        lte.sparsify_(model, lte.MoEficationConfig(expert_size=7, selection="oracle", activation="relu"))
    assert torch.equal(logits(model, "llama"), before)
    assert model.config.hidden_act == "silu"


def test_refused():
    with pytest.raises(ValueError, match="activation is 'gelu', but it is one of relu, relu2"):
        lte.relufy_(tiny_model("llama"), "gelu")  # pyright: ignore
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        lte.CATSConfig(activation="gelu")  # pyright: ignore
    with pytest.raises(ValueError, match="to keep the model's own take cats"):
        lte.ReLUficationConfig(activation=None)
    model = tiny_model("bloom")  # its activation is written into the code
    before = logits(model, "bloom")
    with pytest.raises(ValueError, match="config of BloomForCausalLM does not decide its activation"):
        lte.relufy_(model)
    assert torch.equal(logits(model, "bloom"), before)
