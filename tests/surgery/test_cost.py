from functools import partial

import pytest
import torch
from tiny_models import SHAPES, tiny_config, tiny_model
from transformers import BertConfig, GPT2Config, LlamaConfig, MambaConfig, T5Config

import lte
from lte.core.accounting import G
from lte.surgery.cost import model_shape

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # older transformers


def test_llama_7b_is_the_papers():
    dense = lte.cost_per_token(LlamaConfig())
    assert (dense.gflops, dense.ffn_gflops, dense.attention_gflops) == (12.0625, 8.0625, 4.0)
    assert dense.router_gflops == 0
    sparse = lte.cost_per_token(LlamaConfig(), 0.689)
    assert sparse.gflops == pytest.approx(6.59, abs=0.005)
    assert sparse.router_gflops == 2 * 32 * 344 * 4096 / G
    assert lte.cost_per_token(LlamaConfig(), [0.5] * 16 + [0.878] * 16).gflops == pytest.approx(sparse.gflops)


def test_grouped_query_attention():
    config = tiny_config("llama")  # 32 wide, 4 heads of 8, 2 key-value heads
    assert model_shape(tiny_model("llama")).attention_weights == 2 * (32 * 32 * 2 + 32 * 16 * 2)
    assert lte.cost_per_token(config, expert_size=8).attention_gflops == 2 * 6144 / G


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embedding_are_apart(tied):
    shape = model_shape(tiny_model("llama", tie_word_embeddings=tied), expert_size=8)
    assert shape.head_weights == 48 * 32
    assert shape.embedding_weights == (0 if tied else 48 * 32)
    bytes_of = lte.cost_per_token(tiny_config("llama", tie_word_embeddings=tied), expert_size=8, bytes_per_weight=4)
    assert (bytes_of.head_bytes, bytes_of.embedding_bytes) == (4 * 48 * 32, 0 if tied else 4 * 48 * 32)


def test_tied_embeddings_beside_another_head():
    shape = model_shape(tiny_model("bert"), expert_size=8)  # the head is a dense layer and the tied decoder
    assert shape.head_weights == 32 * 32 + 48 * 32
    assert shape.embedding_weights == 64 * 32 + 2 * 32


def test_fused_projections_count_like_separate_ones():
    fused, plain = (model_shape(tiny_model(family), expert_size=8) for family in ("phi3", "mistral"))
    assert fused.ffn_weights == plain.ffn_weights == (3 * 32 * 64,) * 2
    assert fused.attention_weights == plain.attention_weights


@pytest.mark.parametrize("family", SHAPES)
def test_sparse_and_dense_models_and_configs_agree(family):
    cost_of = partial(lte.cost_per_token, sparsity=0.5, bytes_per_weight=4)
    model = tiny_model(family)
    dense = model_shape(model, expert_size=8)
    lte.sparsify_(model, lte.LTEConfig(expert_size=8, grouping="random"))
    assert model_shape(model) == dense
    assert lte.cost_per_token(model, 0.5) == cost_of(model)
    if SHAPES[family][0] != "MaskedLM":  # a config alone does not say which head, and an encoder's is not assumed
        assert cost_of(tiny_config(family), expert_size=8) == cost_of(model) == cost_of(model.config)


def test_conv1d_and_encoder_decoder():
    gpt2 = lte.cost_per_token(GPT2Config())
    assert gpt2.ffn_gflops * G / 2 == 12 * 2 * 768 * 3072
    assert gpt2.attention_gflops * G / 2 == 12 * 4 * 768 * 768
    t5 = lte.cost_per_token(T5Config())
    assert t5.ffn_gflops * G / 2 == 12 * 2 * 512 * 2048
    assert t5.attention_gflops * G / 2 == (6 + 6 * 2) * 4 * 512 * 512
    assert lte.cost_per_token(BertConfig()).ffn_gflops * G / 2 == 12 * 2 * 768 * 3072


def test_dtype_decides_the_bytes():
    assert lte.cost_per_token(LlamaConfig()).weight_bytes == 12.0625 * G
    assert lte.cost_per_token(LlamaConfig(dtype="float32")).weight_bytes == 2 * 12.0625 * G
    assert lte.cost_per_token(LlamaConfig(dtype=torch.bfloat16)).weight_bytes == 12.0625 * G


def test_errors():
    with pytest.raises(ValueError, match="expert_size 7 does not divide"):
        lte.cost_per_token(LlamaConfig(), 0.5, expert_size=7)
    with pytest.raises(ValueError, match="fraction between"):
        lte.cost_per_token(LlamaConfig(), 50)
    with pytest.raises(ValueError, match="2 sparsities for 32 layers"):
        lte.cost_per_token(LlamaConfig(), [0.1, 0.2])
    with pytest.raises(TypeError, match="not a Linear"):
        lte.cost_per_token(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unknown model family 'mamba'"):
        lte.cost_per_token(MambaConfig(num_hidden_layers=1, hidden_size=8))
