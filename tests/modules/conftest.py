import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import lte

TINY = {"vocab_size": 48, "pad_token_id": 0}


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        attn_implementation="eager",
        **TINY,
    )
    return lte.sparsify_(LlamaForCausalLM(config).eval(), lte.LTEConfig(expert_size=8, grouping="random"))


@pytest.fixture
def t5():
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, **TINY)
    model = T5ForConditionalGeneration(config).eval()
    return lte.sparsify_(model, lte.LTEConfig(expert_size=8, grouping="random"))
