"""The attention of a decoding step. One of them is ours, and registered with Hugging Face's attention functions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from lte.ops.slot_attention import MAX_WIDTH, slot_attention
from lte.ops.sparse_ffn import missing

SLOT_ATTENTION = "lte_slots"
"""The name of :func:`_attend` among Hugging Face's attentions."""


def mask_form(model: PreTrainedModel, graph: bool) -> torch.dtype:
    """Return the form of a step's masks, as :func:`~lte.inference.slot_cache.step_masks` makes them.

    The form is int64 for our own attention. It reads the filled slots alone, whose numbers the mask holds. A step that
    is captured on a GPU uses it if the model's attention goes through Hugging Face's interface.
    """
    if model.config._attn_implementation == "eager":
        return model.dtype
    text = model.config.get_text_config(decoder=True)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    plain = model._supports_attention_backend and getattr(text, "attn_logit_softcapping", None) is None
    ours = graph and plain and width <= MAX_WIDTH and missing("triton") is None
    return torch.int64 if ours else torch.bool


@contextmanager
def attending(model: PreTrainedModel, form: torch.dtype) -> Iterator[None]:
    """Give the model the attention that takes masks of this form, inside the context."""
    if form != torch.int64:
        yield
        return
    configs: dict[int, Any] = {
        id(part.config): part.config
        for part in model.modules()
        if isinstance(getattr(part, "config", None), PretrainedConfig)
    }
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = SLOT_ATTENTION
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Compute attention as Hugging Face's functions do: ``[B, H, 1, D]`` -> ``[B, 1, H, D]``."""
    if other.get("softcap") is not None:
        raise ValueError("the decoding step has no attention with a soft cap: use eager attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return slot_attention(query[:, :, 0], key, value, attention_mask[:, 0, 0], scale)[:, None], None


AttentionInterface.register(SLOT_ATTENTION, _attend)
