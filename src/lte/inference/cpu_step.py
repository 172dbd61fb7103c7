"""Models whose decoding step a CPU runs in one call: which ones, and where their weights are."""

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lte.inference.packed import PackedFFN, activation_name
from lte.inference.sampling import NotCovered
from lte.inference.slot_cache import SlotCache, mask_kinds
from lte.modules.quantised_linear import QuantisedLinear
from lte.ops.sparse_ffn import missing
from lte.ops.weights import Affine, Matrix

_LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Classes of transformers, by name, because importing one takes long."""
_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""The kinds of rotary embedding that depend on a token's position alone."""


def one_call(model: PreTrainedModel, cache: SlotCache, slot_B: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that takes each text's last token ``[B]`` and returns the logits of the next, ``[B, V]``.

    Args:
        model: on a CPU, as it is now. If it changes, the function has to be made again.
        cache: of all texts. The function reads it and writes the new keys and values.
        slot_B: the slot of each text's token.

    Raises:
        NotCovered: the model is of another kind, a part of it was replaced or has hooks, or it is stored in a form
            that the kernels do not take.
    """
    if (reason := missing("cpu")) is not None:
        raise NotCovered(reason)
    ops: Any = import_module("lte.ops.cpu_step")
    stack = _stack(model, cache, ops)
    if (reason := ops.refuses(stack)) is not None:
        raise NotCovered(reason)
    return ops.Step(stack, slot_B)


def covers(model: PreTrainedModel) -> bool:
    """Return whether a step of this model is one call."""
    config: Any = model.config
    try:
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        room = torch.zeros(1, heads, 1, width, dtype=model.dtype)
        cache: Any = SimpleNamespace(layers=[SimpleNamespace(keys=room, values=room)] * config.num_hidden_layers)
        with torch.no_grad():
            one_call(model, cache, torch.zeros(1, dtype=torch.long))
    except (NotCovered, AttributeError):
        return False
    return True


def _stack(model: PreTrainedModel, cache: SlotCache, ops: Any) -> Any:
    kind: Any = next((one for one in type(model).__mro__ if one.__name__ in _LLAMA_LIKE), None)
    if kind is None or type(model).forward is not kind.forward:
        raise NotCovered(f"{type(model).__name__} is not like Llama")
    if model.training or torch.is_autocast_enabled("cpu"):
        raise NotCovered("the model is in training, or under autocast")
    whole: Any = model
    body, config = whole.model, model.config
    _check_plain(model, kind.__module__)
    if body.rotary_emb.rope_type not in _ROTATIONS:
        raise NotCovered(f"its rotary embedding is {body.rotary_emb.rope_type}")
    kinds = mask_kinds(config)
    windows = [kinds[config.layer_types[i]] if isinstance(kinds, dict) else kinds for i in range(len(body.layers))]
    slots = cache.layers[0].keys.shape[2]  # pyright: ignore
    cos, sin = body.rotary_emb(torch.zeros(1), torch.arange(slots)[None])
    if cos.shape[-1] != cache.layers[0].keys.shape[3]:  # pyright: ignore
        raise NotCovered("it rotates a part of a head")
    attention = body.layers[0].self_attn
    return ops.Stack(
        embedding=body.embed_tokens.weight,
        layers=[
            _layer(layer, slot, window, ops)
            for layer, slot, window in zip(body.layers, cache.layers, windows, strict=True)
        ],
        norm=body.norm.weight,
        head=_affine(whole.lm_head),
        cos=cos[0].contiguous(),
        sin=sin[0].contiguous(),
        eps=body.norm.variance_epsilon,
        scaling=attention.scaling,
    )


def _layer(layer: Any, slot: Any, window: int | None, ops: Any) -> Any:
    attention, ffn = layer.self_attn, layer.mlp
    return ops.Layer(
        norm=layer.input_layernorm.weight,
        **{name: _affine(getattr(attention, f"{name}_proj")) for name in ("q", "k", "v", "o")},
        **{name: attention._modules[name].weight if name in attention._modules else None for name in _HEAD_NORMS},
        ffn_norm=layer.post_attention_layernorm.weight,
        ffn=_ffn(ffn, ops),
        keys=slot.keys,
        values=slot.values,
        window=window,
    )


_HEAD_NORMS = ("q_norm", "k_norm")


def _ffn(ffn: Any, ops: Any) -> Any:
    if isinstance(ffn, PackedFFN):
        if ffn.packed.backend not in ("auto", "cpu") or not ffn.skips(ffn.lte_router.weight):
            raise NotCovered("an FFN computes all of its experts")
        return ffn.packed.weights(ffn.lte_router, ffn.compensation, ffn.tau)
    act = activation_name(ffn.act_fn)
    if act is None:
        raise NotCovered(f"the activation {type(ffn.act_fn).__name__} is not one of lte.sparse_ffn")
    return ops.DenseFFN(_affine(ffn.gate_proj), _affine(ffn.up_proj), _affine(ffn.down_proj), act)


def _affine(linear: Any) -> Affine:
    if type(linear) is QuantisedLinear:
        return Affine(linear.matrix, linear.bias)
    weight = linear.weight
    if type(weight).__name__ == "Int8Tensor":  # of torchao
        return Affine(Matrix(weight.qdata, weight.scale.flatten()), linear.bias)
    if type(weight) is not nn.Parameter:
        raise NotCovered(f"a weight is a {type(weight).__name__}")
    return Affine(Matrix(weight), linear.bias)


def _check_plain(module: nn.Module, family: str) -> None:
    """Raise NotCovered unless all modules are of the family's classes or torch's own, without hooks.

    What is inside of a sparse FFN is checked by the FFN itself.

    Args:
        family: the Python module of the family's classes.
    """
    known = type(module) in _PLAIN or type(module).__module__ in (family, "transformers.activations")
    whole = isinstance(module, PreTrainedModel)  # its class may be a subclass with the same forward
    if not (known or whole or isinstance(module, PackedFFN)):
        raise NotCovered(f"a {type(module).__name__} is in it")
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise NotCovered(f"its {type(module).__name__} has hooks or another forward")
    if not isinstance(module, PackedFFN):
        for child in module.children():
            _check_plain(child, family)


_PLAIN = (nn.Linear, QuantisedLinear, nn.Embedding, nn.ModuleList, nn.SiLU, nn.GELU, nn.ReLU)
