"""Every family of the table on a tiny random model: the same function, the same names, the same after saving."""

import copy
import dataclasses
import pickle

import pytest
import torch
import transformers
from tiny_models import SHAPES, relative_rms, tiny_inputs, tiny_model

import lte
from lte.modules.recording import sparse_layers
from lte.surgery.families import family_rows, known_families
from lte.surgery.sites import find_sites

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # older transformers
EXPERT_SIZE = 8


def converted(family, grouping="random", **overrides):
    return lte.sparsify_(tiny_model(family, **overrides), lte.LTEConfig(expert_size=EXPERT_SIZE, grouping=grouping))


@torch.no_grad()
def logits(model, family):
    return model(**tiny_inputs(family)).logits


def test_every_family_is_tested():
    assert known_families() == sorted(SHAPES)


@pytest.mark.parametrize("family", SHAPES)
def test_dense_mode_is_the_models_own_function(family):
    model = tiny_model(family)
    before, expected = copy.deepcopy(model.state_dict()), logits(model, family)
    lte.sparsify_(model, lte.LTEConfig(expert_size=EXPERT_SIZE, grouping="kmeans"))
    after = model.state_dict()

    assert relative_rms(logits(model, family), expected) <= 1e-6

    new = after.keys() - before.keys()
    assert before.keys() <= after.keys()
    assert new
    assert all(".router." in name for name in new)
    for site in find_sites(model, family):
        for linear in site.projections().values():
            name = next(name for name, module in model.named_modules() if module is linear)
            moved, original = after[f"{name}.weight"], before[f"{name}.weight"]
            assert not torch.equal(moved, original)
            assert torch.equal(moved.flatten().sort().values, original.flatten().sort().values)
    assert len(sparse_layers(model)) == len(find_sites(model, family))

    for mode in ("soft", "hard"):
        lte.set_mode_(model, mode)
        assert relative_rms(logits(model, family), expected) > 1e-2


@pytest.mark.parametrize("family", SHAPES)
def test_saved_and_loaded_it_computes_the_same_bits(family, tmp_path):
    model = converted(family)
    auto = getattr(transformers, f"AutoModelFor{SHAPES[family][0]}")
    for mode in ("hard", "soft", "dense"):
        lte.set_mode_(model, mode)
        model.save_pretrained(tmp_path)
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is type(model)
        assert {layer.mode for layer in sparse_layers(loaded).values()} == {mode}
        assert torch.equal(logits(loaded, family), logits(model, family))
        assert loaded.config.lte == model.config.lte
        assert loaded.config.model_type == family


@pytest.mark.parametrize("family", SHAPES)
def test_copied_and_pickled_it_computes_the_same_bits(family):
    model = converted(family)
    lte.set_mode_(model, "hard")
    expected = logits(model, family)
    twin, back = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for layer in sparse_layers(model).values():
        layer.set_mode("dense")
    for other in (twin, back):
        assert type(other) is type(model)
        assert torch.equal(logits(other, family), expected)


@pytest.mark.parametrize("family", SHAPES)
def test_training_reaches_every_parameter(family):
    model = converted(family)
    lte.set_mode_(model, "soft")
    model(**tiny_inputs(family)).logits.square().mean().backward()
    routers = [p for name, p in model.named_parameters() if ".router." in name]
    assert all(p.grad is not None and p.grad.ne(0).any() for p in routers)
    for site in find_sites(model, family):
        assert all(linear.weight.grad.ne(0).any() for linear in site.projections().values())


def test_gated_and_plain_t5():
    for form, count in (("gated-gelu", 3), ("relu", 2)):
        model = tiny_model("t5", feed_forward_proj=form)
        assert [len(site.projections()) for site in find_sites(model, "t5")] == [count] * 4


def test_rows_that_leave_their_site():
    with pytest.raises(ValueError, match="direct child of site 'mlp'"):
        lte.Family("Layer", site="mlp", up="fc1", down="mlp.fc2", act="mlp.act")


def test_unknown_family_says_how_to_register_it():
    with pytest.raises(ValueError, match="unknown model family 'mamba'") as error:
        family_rows("mamba")
    assert "lte.register_family('mamba', lte.Family(layer=\"ItsDecoderLayer\"" in str(error.value)
    assert "llama" in str(error.value)


def test_registering_twice_needs_replace(family_table):
    row = lte.Family("Layer", up="fc1", down="fc2", act="act")
    lte.register_family("made_up", row)
    with pytest.raises(ValueError, match="replace=True"):
        lte.register_family("made_up", row)
    lte.register_family("made_up", row, row, replace=True)
    assert family_rows("made_up") == (row, row)
    with pytest.raises(ValueError, match="at least one"):
        lte.register_family("empty")


def test_a_row_that_does_not_fit_says_what_it_looked_for(family_table):
    lte.register_family("llama", lte.Family("LlamaDecoderLayer", up="fc1", down="fc2", act="act"), replace=True)
    with pytest.raises(ValueError, match="LlamaDecoderLayer has fc1, fc2 and act"):
        converted("llama")


def test_a_gated_ffn_by_its_activation_alone(family_table):
    whole = converted("llama")
    row = family_rows("llama")[0]
    lte.register_family("llama", dataclasses.replace(row, site=None), replace=True)
    parts = converted("llama")
    for mode in ("dense", "soft", "hard"):
        for model in (whole, parts):
            lte.set_mode_(model, mode)
        assert relative_rms(logits(parts, "llama"), logits(whole, "llama")) <= 1e-6
