"""Both kinds of sites: FFNs, and every linear layer of the blocks."""

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import LlamaForCausalLM

import lte
from lte.surgery.sites import find_sites, linear_sites


@pytest.mark.parametrize(("family", "count"), [("llama", 7), ("gpt2", 4), ("phi3", 4), ("opt", 6)])
def test_linear_layers_of_ffns_are_projections_of_their_sites(family, count):
    model = tiny_model(family)
    ffns, linears = find_sites(model, family), linear_sites(model, family)
    assert len(linears) == count * len(ffns)
    inside = {site.name: site.linear for site in linears if site.in_ffn}
    assert inside == {name: linear for site in ffns for name, linear in site.projections().items()}
    assert sum(site.num_weights for site in linears if site.in_ffn) == sum(site.num_weights for site in ffns)
    assert all(model.get_submodule(site.name) is site.linear for site in linears)
    assert all(site.projections() == {site.name: site.linear} for site in linears)


def without_weights():
    with torch.device("meta"):
        return LlamaForCausalLM(tiny_model("llama").config)


def wrapped():
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.up_proj = nn.Sequential(mlp.up_proj)
    return model


def in_float8():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.o_proj.to(torch.float8_e4m3fn)
    return model


@pytest.mark.parametrize(
    "convert", [lambda m: lte.teal_(m, lte.TEALConfig(), []), lambda m: lte.prune_(m, lte.MagnitudeConfig())]
)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without_weights, "is on the meta device: load the model's weights first"),
        (wrapped, "mlp.up_proj is a torch.nn.modules.container.Sequential, not a linear layer"),
        (in_float8, "holds quantised weights .torch.float8_e4m3fn of shape"),
    ],
)
def test_what_is_not_plain_is_refused(convert, make, message):
    model = make()
    with pytest.raises(ValueError, match=message) as error:
        convert(model)
    assert "\n" not in str(error.value)
    assert type(model) is LlamaForCausalLM
