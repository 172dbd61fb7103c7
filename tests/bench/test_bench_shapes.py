"""The table of published shapes, against the parameter counts that were published with them."""

import pytest
from transformers import GPT2Config, LlamaConfig

from lte.bench.shapes import SHAPES, FFNSize, ffn_size, shape_config
from lte.surgery.cost import meta_model

PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    assert sum(p.numel() for p in meta_model(shape_config(name)).parameters()) == PUBLISHED[name]


def test_every_shape_is_checked_and_divides_into_experts():
    assert SHAPES.keys() == PUBLISHED.keys()
    for name in SHAPES:
        assert ffn_size(shape_config(name)).d_ff % 32 == 0


def test_ffn_size_of_other_families():
    assert ffn_size(GPT2Config(n_layer=1, n_embd=32, n_head=2)) == FFNSize(32, 128, False, "gelu_tanh")
    with pytest.raises(ValueError, match="activation"):
        ffn_size(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, hidden_act="tanh"))
    with pytest.raises(ValueError, match="llama2-7b"):
        shape_config("llama9")
