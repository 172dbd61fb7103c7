"""A tiny random model of every family, with every parameter away from its initial zeros and ones."""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

VOCABULARY = 48
D_FF = 64

_USUAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": D_FF,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WITHOUT_GQA = {name: value for name, value in _USUAL.items() if name not in ("num_key_value_heads", "head_dim")}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_inner": D_FF,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "n_ctx": 64,
    "rotary_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {**_WITHOUT_GQA, "type_vocab_size": 2}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": D_FF,
    "decoder_ffn_dim": 2 * D_FF,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": D_FF,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}

_PLAIN_NAMES = [
    "mistral",
    "ministral",
    "ministral3",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo",
    "olmo2",
]
_PLAIN_NAMES += ["olmo3", "cohere", "cohere2", "phi3", "glm", "glm4", "exaone4", "nanochat"]

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("CausalLM", {**_USUAL, "attention_bias": True, "mlp_bias": True}),
    **dict.fromkeys(_PLAIN_NAMES, ("CausalLM", _USUAL)),
    **dict.fromkeys(["granite", "smollm3", "helium", "seed_oss", "arcee"], ("CausalLM", {**_USUAL, "mlp_bias": True})),
    "nemotron": ("CausalLM", {**_USUAL, "mlp_bias": True, "attention_bias": True}),
    "stablelm": ("CausalLM", {**_USUAL, "use_qkv_bias": True}),
    "ernie4_5": ("CausalLM", {**_USUAL, "use_bias": True}),
    "starcoder2": ("CausalLM", _USUAL),
    "modernbert": ("MaskedLM", {**_WITHOUT_GQA, "mlp_bias": True, "cls_token_id": 1, "sep_token_id": 2}),
    **{name: ("CausalLM", _GPT) for name in ("gpt2", "gpt_bigcode", "gptj", "codegen")},
    "gpt_neo": (
        "CausalLM",
        {**_WITHOUT_GQA, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "gpt_neox": ("CausalLM", _WITHOUT_GQA),
    "falcon": ("CausalLM", {**_WITHOUT_GQA, "ffn_hidden_size": D_FF, "bias": True}),
    "persimmon": ("CausalLM", _WITHOUT_GQA),
    "phi": ("CausalLM", _WITHOUT_GQA),
    "opt": (
        "CausalLM",
        {**_WITHOUT_GQA, "ffn_dim": D_FF, "word_embed_proj_dim": 32},
    ),
    "biogpt": ("CausalLM", _WITHOUT_GQA),
    "bloom": ("CausalLM", {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "mpt": ("CausalLM", {"vocab_size": VOCABULARY, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    **{name: ("MaskedLM", _BERT) for name in ("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2")},
    "distilbert": (
        "MaskedLM",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": D_FF, "n_layers": 2, "n_heads": 4},
    ),
    "t5": ("Seq2SeqLM", _T5),
    "mt5": ("Seq2SeqLM", {**_T5, "feed_forward_proj": "gated-gelu"}),
    **{name: ("Seq2SeqLM", _BART) for name in ("bart", "mbart", "pegasus", "marian")},
}
"""Family -> head, and what makes it tiny."""


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    shape = SHAPES[model_type][1]
    return AutoConfig.for_model(model_type, **{**shape, **overrides})


def tiny_model(model_type: str, seed: int = 0, head: str | None = None, **overrides: Any) -> PreTrainedModel:
    """In mode eval, in fp32."""
    torch.manual_seed(seed)
    auto = getattr(transformers, f"AutoModelFor{head or SHAPES[model_type][0]}")
    model = auto.from_config(tiny_config(model_type, **overrides))
    randomise_(model, seed)
    return model.eval()


@torch.no_grad()
def randomise_(model: torch.nn.Module, seed: int = 0) -> None:
    """Move every parameter, so that no bias is zero and no norm the identity."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):  # sinusoids are not
        parameter.add_(torch.randn(parameter.shape, generator=generator).mul_(0.1).to(parameter.dtype))


def tiny_inputs(model_type: str, rows: int = 2, length: int = 7) -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if SHAPES[model_type][0] == "Seq2SeqLM":
        inputs["decoder_input_ids"] = tokens.flip(-1)[:, : length - 2]
    return inputs


def relative_rms(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).double().square().mean() / expected.double().square().mean()).sqrt().item()
