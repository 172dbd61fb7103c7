"""A sparse model whose weights are partly on the disk (``device_map``) gives equal tokens; nothing packs it."""

import pytest
import torch
from accelerate import dispatch_model
from tiny_models import tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

import lte

LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    config = lte.LTEConfig(expert_size=8, grouping="random", compensation_rank=2)
    model = lte.sparsify_(tiny_model("llama", num_hidden_layers=LAYERS), config)
    lte.set_mode_(model, "hard")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def offloaded(folder, whole, tmp_path):
    """Some blocks are on the CPU, and the others on the disk."""
    memory = {"cpu": sum(weight.nbytes for weight in whole.parameters()) // 2}
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory=memory, offload_folder=tmp_path / "disk"
    )
    assert {"cpu", "disk"} <= {str(place) for place in model.hf_device_map.values()}
    assert any(weight.is_meta for weight in model.parameters())
    return model.eval()


OPTIONS = {"max_new_tokens": 8, "do_sample": False}


def test_equal_tokens(offloaded, whole):
    inputs = tiny_inputs("llama")
    expected = whole.generate(**inputs, **OPTIONS)
    assert torch.equal(offloaded.generate(**inputs, **OPTIONS), expected)
    assert torch.equal(lte.generate(whole, inputs, **OPTIONS), expected)
    assert torch.equal(lte.generate(offloaded, inputs, **OPTIONS), expected)
    with torch.no_grad():
        assert torch.equal(offloaded(**inputs).logits, whole(**inputs).logits)


def test_sparsity_is_measured(offloaded, whole):
    measured = []
    for model in (offloaded, whole):
        with torch.no_grad(), lte.track_sparsity(model) as meter:
            model(**tiny_inputs("llama"))
        measured.append(meter.by_layer)
    assert measured[0] == measured[1]
    assert 0 < sum(measured[0]) < LAYERS


def test_weights_on_the_cpu_for_another_device(folder, whole, tmp_path):
    """The hooks of CPU offload, with the CPU as the device that computes."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(LAYERS)}
    model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True).eval()
    inputs = tiny_inputs("llama")
    assert torch.equal(lte.generate(model, inputs, **OPTIONS), whole.generate(**inputs, **OPTIONS))


@pytest.mark.parametrize(
    "change",
    [
        lte.optimize_,
        lambda model: lte.quantise_(model, "int8"),
        lte.densify,
    ],
)
def test_what_changes_whole_weights_refuses(offloaded, change):
    with pytest.raises(ValueError, match=r"is on the meta device: load the model's weights first, without offload"):
        change(offloaded)
    assert not any("acked" in type(module).__name__ for module in offloaded.modules())
