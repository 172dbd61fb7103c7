"""The GGUF file that llama.cpp gets holds the same model: its tokens are Hugging Face's."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lte.bench.llama_cpp import FORMS, LlamaCpp, is_there, write_gguf

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama 3.2": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
}


def make(name: str):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 4 * parameter.shape[-1] ** -0.5)
            if parameter.ndim == 1:
                parameter.add_(1)
    return model.bfloat16().float()


@pytest.mark.skipif(not is_there(), reason="needs llama.cpp: pip install 'lte[peers]'")
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_hugging_faces(name):
    model = make(name)
    prompt = torch.randint(1, 320, (1, 40), generator=torch.Generator().manual_seed(1))
    peer = LlamaCpp(model, "BF16", 40, 6)
    answer = peer._server.handle_completions({"prompt": prompt[0].tolist(), "n_predict": 4, "temperature": 0})
    found = [int(one) for one in re.findall(r"<(\d+)>", answer["choices"][0]["text"])]
    expected = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, 40:].tolist()
    assert found == expected
    decoded = peer(prompt)
    assert len(decoded.steps) == 5
    assert min(decoded.prefill, *decoded.steps) > 0


@pytest.mark.parametrize("form", FORMS)
def test_sizes_of_the_forms(form, tmp_path):
    model, path = make("llama 3.2"), tmp_path / "model.gguf"
    write_gguf(model, path, form)
    bits = {"BF16": 16, "Q8_0": 8.5, "Q4_0": 4.5}[form]
    weights = sum(one.numel() for one in model.parameters() if one.ndim == 2)
    assert path.stat().st_size == pytest.approx(weights * bits / 8, rel=0.25)  # and the vocabulary


def test_other_families_are_refused(tmp_path):
    config = OPTConfig(vocab_size=100, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="opt is not written as GGUF"):
        write_gguf(OPTForCausalLM(config), tmp_path / "model.gguf", "Q8_0")
