"""int8 by torch's own dynamic quantisation: what it makes of a sparse model computes nearly the same."""

import pytest
import torch
from tiny_models import relative_rms, tiny_inputs, tiny_model

import lte
from lte.modules.recording import sparse_layers
from lte.surgery.cost import cost_per_token

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantize.*:UserWarning")
INT8 = "torch.ao.nn.quantized.dynamic"


def sparse(family):
    """Its routers look at no token, so that what int8 rounds flips no expert."""
    model = lte.sparsify_(tiny_model(family), lte.LTEConfig(expert_size=8, grouping="random", compensation_rank=4))
    for layer in sparse_layers(model).values():
        layer.router.weight.data.zero_()
        layer.router.bias.data.copy_(torch.tensor([2.0, -2.0]).repeat(layer.router.num_experts // 2))
        layer.compensation.expand.data.normal_(std=0.1)
    return model


@torch.no_grad()
def logits(model, family):
    return model(**tiny_inputs(family)).logits


def quantised(model):
    found = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert any(type(module).__module__.startswith(INT8) for module in found.modules())
    return found


@pytest.mark.parametrize("mode", ["dense", "soft", "hard"])
@pytest.mark.parametrize("family", ["llama", "phi3", "starcoder2", "bert", "opt", "t5"])
def test_close_in_every_mode(family, mode):
    model = sparse(family)
    lte.set_mode_(model, mode)
    twin = quantised(model)
    assert 1e-4 < relative_rms(logits(twin, family), logits(model, family)) < 0.1
    lte.set_mode_(twin, "dense")
    lte.set_mode_(model, "dense")
    assert relative_rms(logits(twin, family), logits(model, family)) < 0.1


@pytest.mark.parametrize("family", ["llama", "phi3", "bert", "opt"])
def test_close_after_optimize_(family):
    model = sparse(family)
    lte.set_mode_(model, "hard")
    lte.optimize_(model, "reference")
    assert 1e-4 < relative_rms(logits(quantised(model), family), logits(model, family)) < 0.1


def test_what_needs_floats_says_so():
    model = sparse("llama")
    lte.set_mode_(model, "hard")
    twin = quantised(model)
    with pytest.raises(ValueError, match="not a linear layer"):
        lte.optimize_(twin)
    with pytest.raises(ValueError, match="holds quantised weights"):
        cost_per_token(twin)
