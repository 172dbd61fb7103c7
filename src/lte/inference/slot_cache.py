"""Keys and values for the decoding loop: each row's tokens fill the slots from 0 on, without padding."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from lte.inference.sampling import NotCovered

Masks = dict[str, Tensor | None] | Tensor
"""The mask of a step; if a model has several kinds of layer, one for each kind."""
FULL, SLIDING = "full_attention", "sliding_attention"


class SlotLayer(StaticLayer):
    """One layer's keys and values, ``[B, H, S, d]``. A step writes one slot of each row."""

    def __init__(self, slots: int, slot_B: Tensor) -> None:
        super().__init__(max_cache_len=slots)
        self.slot_B = slot_B
        self.rows_B = torch.arange(len(slot_B), device=slot_B.device)
        self.seen, self.together = slots, False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token of each row into its slot and return all slots that are seen."""
        assert self.keys is not None
        assert self.values is not None
        if self.together:
            self.keys.index_copy_(2, self.slot_B[:1], key_states)
            self.values.index_copy_(2, self.slot_B[:1], value_states)
        else:
            self.keys[self.rows_B, :, self.slot_B] = key_states[:, :, 0]
            self.values[self.rows_B, :, self.slot_B] = value_states[:, :, 0]
        if self.seen == self.max_cache_len:
            return self.keys, self.values
        return self.keys[:, :, : self.seen], self.values[:, :, : self.seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen, 0

    def get_seq_length(self) -> int:
        """Return a number above 0, as after a prompt: the tokens before the one that a step writes."""
        return self.seen - 1


class SlotCache(Cache):
    """A static cache in which each row has its own length.

    The slot of a token is its position in the text. So a row needs no mask for padding: it reads its slots up to the
    last one. Layers with a sliding window keep all slots and mask those before the window, as a CUDA graph needs it.

    Args:
        filled: the prompts' cache, which gives shapes, dtype and device.
        batch: number of rows, at least the number of prompts.
        slots: number of slots of each row.
        slot_B: ``[B]`` int64, the slot that the next step writes. The caller changes it.
    """

    def __init__(self, filled: DynamicCache, batch: int, slots: int, slot_B: Tensor) -> None:
        super().__init__(layers=[SlotLayer(slots, slot_B) for _ in filled.layers])
        for layer, prompt in self._beside(filled):
            layer.lazy_initialization(_rows(prompt.keys, batch), _rows(prompt.values, batch))

    def fill(self, filled: DynamicCache, padding_B: Tensor) -> None:
        """Copy the keys and values of prompts into the slots.

        Args:
            filled: the cache of prompts that are padded on the left.
            padding_B: ``[B]`` int64, the number of padding tokens before each prompt.
        """
        for layer, prompt in self._beside(filled):
            length = int(prompt.get_seq_length())
            batch, heads, kept = prompt.keys.shape[:3]  # a sliding window keeps the last tokens only
            column_BS = torch.arange(length, device=padding_B.device) + padding_B[:, None] - (length - kept)
            column_BHS = column_BS.clamp(0, kept - 1)[:, None, :].expand(batch, heads, length)
            for slots, prompts in ((layer.keys, prompt.keys), (layer.values, prompt.values)):
                slots[:batch, :, :length] = prompts.gather(
                    2, column_BHS[..., None].expand(*column_BHS.shape, prompts.shape[-1])
                )

    def show(self, seen: int, together: bool) -> None:
        """Let an eager step see so many slots. Without this, a step sees all, as a captured one must.

        Args:
            seen: up to the slot that the longest row writes.
            together: whether all rows write the same slot.
        """
        for layer in self.layers:
            assert isinstance(layer, SlotLayer)
            layer.seen, layer.together, layer.is_compileable = seen, together, False

    def _beside(self, filled: DynamicCache) -> Iterator[tuple[Any, Any]]:
        return zip(self.layers, filled.layers, strict=True)


def mask_kinds(config: PretrainedConfig) -> dict[str, int | None] | int | None:
    """Return the size of the attention window, None for no window; if layers have kinds, one for each kind.

    Raises:
        NotCovered: attention is of another kind.
    """
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    if getattr(text, "alibi", False) or getattr(text, "attention_chunk_size", None) is not None:
        raise NotCovered("its attention is neither full nor a sliding window")
    if not hasattr(text, "layer_types") or text.layer_types is None:
        return window
    kinds = set(text.layer_types)
    if kinds - {FULL, SLIDING}:
        raise NotCovered(f"it has layers of {', '.join(sorted(kinds - {FULL, SLIDING}))}")
    return {kind: window if kind == SLIDING else None for kind in sorted(kinds)}


def step_masks(
    kinds: dict[str, int | None] | int | None, slot_B: Tensor, seen: int, form: torch.dtype, together: bool = False
) -> Masks | None:
    """Return the mask of each row's token, ``[B, 1, 1, S]``; if layers have kinds, one for each kind.

    Args:
        kinds: as :func:`mask_kinds` returns them.
        slot_B: the slot of each row's token.
        seen: number of slots that attention gets.
        form: with bool, the mask is True at slots that the token reads. With a floating point dtype, the mask is added
            to scores. With int64, it holds the first and the last slot, ``[B, 1, 1, 2]``.
        together: all rows write the last slot that is seen. If no window hides a slot, the mask is then None.
    """

    def mask(window: int | None) -> Tensor | None:
        if together and (window is None or seen <= window):
            return None
        if form == torch.int64:
            first_B = torch.zeros_like(slot_B) if window is None else (slot_B - window + 1).clamp(min=0)
            return torch.stack([first_B, slot_B], -1)[:, None, None]
        column_S, last_B1 = torch.arange(seen, device=slot_B.device), slot_B[:, None]
        seen_BS = column_S <= last_B1
        if window is not None:
            seen_BS = seen_BS & (column_S > last_B1 - window)
        shown = seen_BS[:, None, None]
        return shown if form == torch.bool else torch.where(shown, 0.0, torch.finfo(form).min).to(form)

    if isinstance(kinds, dict):
        return {kind: mask(window) for kind, window in kinds.items()}
    if kinds is not None:  # left without one, a model would look for a window of its own
        together = False
    return mask(kinds)


def check_filled(cache: object) -> None:
    """Raise NotCovered unless the cache of a prompt holds only keys and values of full or sliding attention."""
    if type(cache) is not DynamicCache or any(
        type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    ):
        raise NotCovered("its cache holds more than keys and values")


def _rows(states: Tensor, batch: int) -> Tensor:
    """Return a view with the shape of ``batch`` rows. Only its shape, dtype and device are used."""
    return states[:1].expand(batch, *states.shape[1:])
