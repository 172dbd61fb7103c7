"""Published models by name, as Hugging Face configs: sizes for random weights, without a download."""

from dataclasses import dataclass
from typing import Any, cast

from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from lte.ops.weights import Activation
from lte.surgery.cost import meta_model
from lte.surgery.sites import find_sites

_LLAMA3_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
_LLAMA32_ROPE = {
    **_LLAMA3_ROPE,
    "rope_type": "llama3",
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}


def _sizes(vocab: int, width: int, d_ff: int, layers: int, heads: int, kv_heads: int, positions: int) -> dict[str, int]:
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": d_ff,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
    }


def _theta(value: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": value}


SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama2-7b": (
        LlamaConfig,
        {**_sizes(32000, 4096, 11008, 32, 32, 32, 4096), "rms_norm_eps": 1e-5, "rope_parameters": _theta(1e4)},
    ),
    "llama3-8b": (
        LlamaConfig,
        {**_sizes(128256, 4096, 14336, 32, 32, 8, 8192), "rms_norm_eps": 1e-5, "rope_parameters": _LLAMA3_ROPE},
    ),
    "llama3.2-1b": (
        LlamaConfig,
        {
            **_sizes(128256, 2048, 8192, 16, 32, 8, 131072),
            "rms_norm_eps": 1e-5,
            "rope_parameters": _LLAMA32_ROPE,
            "tie_word_embeddings": True,
        },
    ),
    # as of version 0.2, which has no sliding window
    "mistral-7b": (
        MistralConfig,
        {
            **_sizes(32000, 4096, 14336, 32, 32, 8, 32768),
            "rms_norm_eps": 1e-5,
            "rope_parameters": _theta(1e6),
            "sliding_window": None,
        },
    ),
    "qwen2.5-7b": (
        Qwen2Config,
        {**_sizes(152064, 3584, 18944, 28, 28, 4, 131072), "rms_norm_eps": 1e-6, "rope_parameters": _theta(1e6)},
    ),
    "smollm2-135m": (
        LlamaConfig,
        {
            **_sizes(49152, 576, 1536, 30, 9, 3, 8192),
            "rms_norm_eps": 1e-5,
            "rope_parameters": _theta(1e5),
            "tie_word_embeddings": True,
        },
    ),
}

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class FFNSize:
    """The size and kind of an FFN, without its weights."""

    d_model: int
    d_ff: int
    gated: bool
    act: Activation

    @property
    def weights_per_neuron(self) -> int:
        return self.d_model * (3 if self.gated else 2)


def shape_config(name: str) -> PretrainedConfig:
    """Return the config of a published shape. It has no EOS, because random weights would end a text anywhere.

    Raises:
        ValueError: there is no such name.
    """
    if name not in SHAPES:
        raise ValueError(f"shape is {name!r}, but it is one of {', '.join(SHAPES)} (or give --model)")
    config_class, values = SHAPES[name]
    return config_class(**{**values, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None})


def ffn_size(config: PretrainedConfig) -> FFNSize:
    """Return the size of the first FFN of a model of this config.

    Raises:
        ValueError: the family is unknown, or ``sparse_ffn`` does not have the activation.
    """
    site = find_sites(meta_model(config), cast(str, config.model_type))[0]
    text = config.get_text_config()
    act = next((getattr(text, n) for n in ("hidden_act", "hidden_activation", "activation_function") if n in text), "")
    if act not in _ACTIVATIONS:
        raise ValueError(
            f"the activation of {config.model_type} is {act!r}, but it is one of {', '.join(_ACTIVATIONS)}"
        )
    return FFNSize(site.d_model, site.d_ff, site.gated, _ACTIVATIONS[act])
