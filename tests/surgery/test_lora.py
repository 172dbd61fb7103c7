"""LoRA by ``peft`` on a sparse model: adapters wrap the projections where they are."""

import warnings

import pytest
import torch
from tiny_models import relative_rms, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

import lte
from lte.modules.recording import sparse_layers

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it

TARGETS = {
    "llama": (["gate_proj", "up_proj", "down_proj"], False),
    "phi3": (["gate_up_proj", "down_proj"], False),
    "gpt2": (["c_fc", "c_proj"], True),
    "opt": (["fc1", "fc2"], False),
    "bert": (["dense"], False),
    "t5": (["wi", "wo"], False),
}


def adapted(family, mode, targets=None):
    model = lte.sparsify_(tiny_model(family), lte.LTEConfig(expert_size=8, grouping="random"))
    lte.set_mode_(model, mode)
    fan_in_fan_out = TARGETS[family][1]
    config = peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=fan_in_fan_out, lora_dropout=0.0)
    return peft.get_peft_model(model, config)


def loss_of(model, family):
    return model(**tiny_inputs(family)).logits.float().square().mean()


@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("family", TARGETS)
def test_trains_and_merges(family, mode):
    model = adapted(family, mode, TARGETS[family][0])
    wrapped = [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert wrapped
    assert not any("router" in name for name in wrapped)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)

    optimizer = torch.optim.SGD(trainable.values(), lr=1.0)
    with torch.no_grad():
        before = model(**tiny_inputs(family)).logits
    for _ in range(2):  # the first step moves B away from zero, the second A
        optimizer.zero_grad()
        loss_of(model, family).backward()
        assert all(p.grad is not None for p in trainable.values())
        optimizer.step()
    with torch.no_grad(), lte.track_sparsity(model) as meter:
        after = model(**tiny_inputs(family)).logits
        assert relative_rms(after, before) > 1e-3
        assert 0.2 < meter.overall < 0.8
    merged = model.merge_and_unload()
    assert type(merged).__name__.startswith("LTE")
    with torch.no_grad(), lte.track_sparsity(merged) as again:
        assert relative_rms(merged(**tiny_inputs(family)).logits, after) <= 1e-5
    assert not any("lora" in name for name in merged.state_dict())
    assert again.overall == pytest.approx(meter.overall, abs=0.02)


def test_default_targets_are_those_of_the_base_model_type():
    model = adapted("llama", "hard")
    wrapped = {
        name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert {"q_proj", "v_proj"} <= wrapped


def test_routers_can_be_trained_beside_the_adapters(tmp_path):
    model = lte.sparsify_(tiny_model("llama"), lte.LTEConfig(expert_size=8, grouping="random"))
    lte.set_mode_(model, "soft")
    config = peft.LoraConfig(r=4, target_modules=["up_proj"], modules_to_save=["router"])
    model = peft.get_peft_model(model, config)
    loss_of(model, "llama").backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("router.modules_to_save.default.weight" in name for name in trained)
    assert any("lora_B" in name for name in trained)


def test_merged_model_saves_and_loads(tmp_path):
    merged = adapted("llama", "hard", ["up_proj"]).merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**tiny_inputs("llama")).logits, merged(**tiny_inputs("llama")).logits)


def test_an_adapter_saves_and_loads(tmp_path):
    model = adapted("llama", "hard", ["up_proj"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    base = tmp_path / "base"
    lte.sparsify_(dense := tiny_model("llama"), lte.LTEConfig(expert_size=8, grouping="random"))
    lte.set_mode_(dense, "hard")
    dense.save_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for the base model's config on the hub
        model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(**tiny_inputs("llama")).logits, model(**tiny_inputs("llama")).logits)


def test_a_model_with_adapters_is_not_converted():
    dense = tiny_model("llama")
    model = peft.get_peft_model(dense, peft.LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="merge adapters first"):
        lte.sparsify_(model.base_model.model, lte.LTEConfig(expert_size=8, grouping="random"))
    with pytest.raises(ValueError, match="merge adapters first"):
        lte.sparsify_(model, lte.LTEConfig(expert_size=8, grouping="random"))


def test_modes_are_set_through_the_wrapper():
    model = adapted("llama", "hard", ["up_proj"])
    lte.set_mode_(model, "soft")
    assert model.base_model.model.config.lte["mode"] == "soft"
    assert {layer.mode for layer in sparse_layers(model).values()} == {"soft"}
