"""Models that earlier versions saved compute what they computed then. ``saved/make.py`` says how they were made."""

import runpy
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from saved.make import IDS
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import lte
from lte.surgery.loading import load_model

SAVED = sorted(path.parent for path in (Path(__file__).parent / "saved").glob("*/computed.safetensors"))


@pytest.mark.parametrize("folder", SAVED, ids=lambda folder: folder.name)
def test_it_computes_what_it_computed(folder):
    expected = load_file(folder / "computed.safetensors")["logits"]
    by_transformers = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for model in (by_transformers, load_model(str(folder), "causal", torch.float32)):
        with torch.no_grad():
            found = model.eval()(input_ids=IDS).logits
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def filled_as_by_vllm(folder):
    """The model of an engine that makes and fills parameters itself, and copies the checkpoint into buffers."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    assert not [name for name, buffer in model.named_buffers() if buffer.is_meta]
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            assert parameter.is_meta
            setattr(module, name, nn.Parameter(torch.full_like(parameter, torch.nan, device="cpu")))
    model.tie_weights()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return model.eval()


@pytest.mark.parametrize("folder", SAVED, ids=lambda folder: folder.name)
def test_an_engine_can_fill_it(folder):
    expected = load_file(folder / "computed.safetensors")["logits"]
    with torch.no_grad():
        assert torch.allclose(filled_as_by_vllm(folder)(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_an_engine_can_fill_quantised_experts(weights, tmp_path):
    model = lte.quantise_(load_model(str(SAVED[0].parent / "lte"), "causal", torch.float32), weights)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(filled_as_by_vllm(tmp_path)(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_the_code_beside_a_model_still_finds_its_classes():
    found = runpy.run_path(str(SAVED[0].parent / "lte" / "modeling_lte.py"))
    assert issubclass(found["LTELlamaForCausalLM"], LlamaForCausalLM)


def test_each_kind_is_there():
    assert len(SAVED) >= 15


@pytest.mark.parametrize("folder", [one for one in SAVED if one.name.startswith("lte")], ids=lambda one: one.name)
def test_it_is_packed_and_computes_the_same(folder):
    """Kernels read what was saved, too."""
    expected = load_file(folder / "computed.safetensors")["logits"]
    model = load_model(str(folder), "causal", torch.float32)
    if model.config.lte["mode"] != "hard":
        pytest.skip("only mode hard is packed")
    lte.optimize_(model, "reference")
    with torch.no_grad():
        assert torch.allclose(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
