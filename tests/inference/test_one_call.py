"""Which models a CPU decodes in one call, and that their tokens are Hugging Face's."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import lte
from lte.bench.routing import random_routers_, route_
from lte.inference.cpu_step import covers
from lte.methods.lte import LTEConfig
from lte.modules.recording import record_scores, sparse_layers
from lte.surgery.convert import set_mode_, sparsify_

pytest.importorskip("lte.ops.cpu_step")
torch.set_num_threads(1)
SIZES = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 256, "num_hidden_layers": 3, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
SLIDING = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "use_sliding_window": True}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama with scaled rotation": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    ),
    "mistral with a window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3 with windows": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, sliding_window=6, **SLIDING)),
}


def make(name: str):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as made, a random model says one token again and again
            parameter.copy_(torch.randn_like(parameter) * 4 * parameter.shape[-1] ** -0.5)
            if parameter.ndim == 1:
                parameter.add_(1)
    return model


def make_sparse(name: str = "llama"):
    model = sparsify_(make(name), LTEConfig(expert_size=8, grouping="random"))
    set_mode_(model, "hard")
    random_routers_(model)
    route_(model, prompts(2)["input_ids"], 0.6)
    return model


def prompts(batch: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 100, (batch, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[: batch // 2, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def check_tokens(model, batch: int = 2, plain=None, **options) -> None:
    """Compare with Hugging Face's loop, which runs ``plain``, the model without its kernels."""
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, **options}
    found = lte.generate(model, prompts(batch), **options)
    expected = (plain or model).generate(**prompts(batch), **options)
    assert torch.equal(found, expected)
    assert len(found[0, 12:].unique()) > 3


@pytest.fixture
def eager(caplog):
    """The reasons why steps were eager."""
    caplog.set_level(logging.INFO, "lte.inference.decoder")
    return lambda: [one.message for one in caplog.records if "is eager" in one.message]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_hugging_faces(name, eager):
    model = make(name)
    for batch in (1, 3):
        check_tokens(model, batch)
    assert covers(model)
    assert not eager()


@pytest.mark.parametrize("name", ["llama", "qwen3 with windows"])
def test_tokens_of_sparse_models(name, eager):
    plain = make_sparse(name)
    model = lte.optimize_(copy.deepcopy(plain))
    for batch in (1, 3):
        check_tokens(model, batch, plain)
    assert not eager()


def test_stopping_and_sampling(eager):
    model = make("llama")
    plain = lte.generate(model, prompts(2), max_new_tokens=24, do_sample=False, eos_token_id=None)
    check_tokens(model, eos_token_id=int(plain[0, 20]), repetition_penalty=1.1)
    options = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.7, "seed": 3}
    assert torch.equal(lte.generate(model, prompts(2), **options), lte.generate(model, prompts(2), **options))
    assert not eager()


def test_changed_weights_count_at_the_next_call():
    model = make("llama")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    before = lte.generate(model, prompts(1), **options)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    assert not torch.equal(lte.generate(model, prompts(1), **options), before)
    check_tokens(model)


def wrapped_linear(model):
    class Wrapper(nn.Linear):
        pass

    model.model.layers[1].self_attn.q_proj.__class__ = Wrapper


CHANGES = {
    "a hook": lambda m: m.model.layers[0].register_forward_hook(lambda *_: None),
    "another forward": lambda m: setattr(m.model.norm, "forward", m.model.norm.forward),
    "a wrapped projection": wrapped_linear,
    "a pruned projection": lambda m: prune.l1_unstructured(m.model.layers[0].mlp.up_proj, "weight", 0.5),
    "training": lambda m: m.train(),
    "mixed precision": lambda m: m.model.layers[0].input_layernorm.half(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_eager(change):
    model = make("llama")
    CHANGES[change](model)
    assert not covers(model)


def test_other_models_and_modes_are_eager(eager):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    assert not covers(gpt2)
    model = lte.optimize_(make_sparse())
    assert covers(model)
    assert not covers(lte.optimize_(copy.deepcopy(model), "reference"))
    next(iter(sparse_layers(model).values())).set_mode("soft")
    assert not covers(model)
    lte.generate(model, prompts(1), max_new_tokens=3, do_sample=False)
    assert eager()


def test_recorded_passes_are_eager():
    model = lte.optimize_(make_sparse())
    with record_scores(model) as recording:
        lte.generate(model, prompts(1), max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert recording.scores


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_models_decode_in_one_call(weights, eager):
    pytest.importorskip("torchao")
    model = lte.optimize_(make_sparse(), weights=weights)
    assert covers(model)
    found = lte.generate(model, prompts(3), max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert not eager()
    logits = lte.optimize_(model, "reference")(**prompts(3), use_cache=False).logits[:, -1]
    assert torch.equal(found[:, 12], logits.argmax(-1))
    eager_tokens = lte.generate(model, prompts(3), max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert torch.equal(found, eager_tokens)
