"""A model that Hugging Face does not know: registered with its Auto classes and with the table, then converted."""

import copy
import pickle

import pytest
import torch
from tiny_models import randomise_, relative_rms
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import lte


class MadeUpConfig(PretrainedConfig):
    model_type = "made_up"

    def __init__(self, width=16, neurons=32, layers=2, **kwargs):
        self.width, self.neurons, self.layers = width, neurons, layers
        super().__init__(**kwargs)


class MadeUpFeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w_in = nn.Linear(config.width, config.neurons)
        self.w_gate = nn.Linear(config.width, config.neurons)
        self.w_out = nn.Linear(config.neurons, config.width)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.w_out(self.act(self.w_gate(x)) * self.w_in(x))


class MadeUpBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mix = nn.Linear(config.width, config.width)
        self.ffn = MadeUpFeedForward(config)

    def forward(self, x):
        x = x + self.mix(x).cumsum(1)
        return x + self.ffn(x)


class MadeUpForCausalLM(PreTrainedModel):
    config_class = MadeUpConfig
    base_model_prefix = "none"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(20, config.width)
        self.blocks = nn.ModuleList([MadeUpBlock(config) for _ in range(config.layers)])
        self.head = nn.Linear(config.width, 20)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return CausalLMOutput(logits=self.head(x))


ROW = lte.Family("MadeUpBlock", site="ffn", gate="ffn.w_gate", up="ffn.w_in", down="ffn.w_out", act="ffn.act")
METHOD = lte.LTEConfig(expert_size=8)
X = {"input_ids": torch.arange(10).view(2, 5)}


@pytest.fixture
def registered(family_table):
    AutoConfig.register("made_up", MadeUpConfig, exist_ok=True)
    AutoModelForCausalLM.register(MadeUpConfig, MadeUpForCausalLM, exist_ok=True)
    lte.register_family("made_up", ROW, replace=True)
    yield
    CONFIG_MAPPING._extra_content.pop("made_up", None)
    AutoModelForCausalLM._model_mapping._extra_content.pop(MadeUpConfig, None)


def test_converts_saves_and_loads(registered, tmp_path):
    model = MadeUpForCausalLM(MadeUpConfig()).eval()
    randomise_(model)
    with torch.no_grad():
        expected = model(**X).logits
        lte.sparsify_(model, METHOD)
        assert relative_rms(model(**X).logits, expected) <= 1e-6
        lte.set_mode_(model, "hard")
        assert relative_rms(model(**X).logits, expected) > 1e-3
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is type(model)
        for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(**X).logits, model(**X).logits)
        with lte.track_sparsity(model) as meter:
            model(**X)
    assert 0 < meter.overall < 1


def test_unregistered(tmp_path):
    model = MadeUpForCausalLM(MadeUpConfig())
    with pytest.raises(ValueError, match=r"unknown model family 'made_up'.*lte\.register_family\('made_up'"):
        lte.sparsify_(model, METHOD)


def test_loading_where_it_is_not_registered(registered, tmp_path, family_table, monkeypatch):
    model = MadeUpForCausalLM(MadeUpConfig())
    lte.sparsify_(model, METHOD)
    model.save_pretrained(tmp_path)
    CONFIG_MAPPING._extra_content.pop("made_up")
    with pytest.raises(ValueError, match=r"AutoConfig\.register\('made_up'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_two_models_of_one_name_do_not_get_mixed_up(registered):
    namesake = type("MadeUpForCausalLM", (MadeUpForCausalLM,), {"marker": True})
    first = lte.sparsify_(MadeUpForCausalLM(MadeUpConfig()), METHOD)
    second = lte.sparsify_(namesake(MadeUpConfig()), METHOD)
    assert isinstance(second, namesake)
    assert not isinstance(first, namesake)
