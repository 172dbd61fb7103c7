"""Decoders of a model, kept from one call of ``generate`` to the next as long as the model does not change."""

import threading
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lte.inference.decoder import Decoder, How, Prompts
from lte.inference.graphs import Unshared
from lte.inference.sampling import NotCovered
from lte.modules.input_threshold import cut_layers
from lte.modules.sparse_ffn import Selecting

_MOST = 4
"""A model keeps at most this many decoders, because each has a cache of keys and values."""
_SMALLEST = 256


class KeptDecoders(Unshared):
    """The last few decoders of one model.

    Attributes:
        lock: held while one of them decodes, because a step has one buffer for its tokens.
        refused: why no step of the model can be captured; None if it can, or if nothing was captured yet.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.refused: str | None = None
        self._state: object = None
        self._decoders: dict[tuple[object, ...], Decoder] = {}

    def renew(self, model: PreTrainedModel) -> None:
        """Drop all decoders if the model has changed. Call it before :meth:`decoder`.

        Raises:
            NotCovered: its step cannot be captured, as an earlier call found out.
        """
        if self._state != (state := _state(model)):
            self._state, self.refused = state, None
            self._decoders.clear()
        if self.refused is not None:
            raise NotCovered(self.refused)

    def forget(self) -> None:
        """Drop all decoders and give their memory on the GPU back."""
        self._decoders.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def decoder(self, model: PreTrainedModel, prompts: Prompts, most: int, how: How) -> Decoder:
        """Return a decoder with room for these prompts and ``most`` new tokens.

        If a step is compiled or captured, sizes are rounded up to powers of 2, so that prompts and batches of similar
        sizes use the same step.
        """
        batch, slots = prompts.ids.shape[0], prompts.ids.shape[1] + most
        if not (how.compile or how.graph):
            return Decoder(model, prompts, batch, slots, how)
        size = _rounded(batch, 1), _rounded(slots, _SMALLEST)
        found = self._decoders.pop((size, how), None) or Decoder(model, prompts, *size, how)
        self._decoders[size, how] = found  # the newest last
        while len(self._decoders) > _MOST:
            del self._decoders[next(iter(self._decoders))]
        return found


def kept_with(model: PreTrainedModel) -> KeptDecoders:
    """Return the decoders that are kept with this model."""
    return vars(model).setdefault("_decoders", KeptDecoders())


def _rounded(size: int, smallest: int) -> int:
    return max(smallest, 1 << (size - 1).bit_length())


def _addresses(tensor: Tensor) -> list[int]:
    """Return where a tensor is. One that torchao quantised has parts."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.data_ptr()]
    parts: Any = tensor.__tensor_flatten__()[0]  # pyright: ignore[reportAttributeAccessIssue]
    return [getattr(tensor, name).data_ptr() for name in parts]


def _state(model: PreTrainedModel) -> object:
    """Return all that a captured step depends on: the addresses of weights, and how each module computes."""
    tensors = tuple(address for one in (*model.parameters(), *model.buffers()) for address in _addresses(one))
    modules = tuple(
        (type(one), one.training, len(one._forward_hooks), len(one._forward_pre_hooks), vars(one).get("forward"))
        for one in model.modules()
    )
    cuts = tuple((one.cutting, getattr(one, "backend", None)) for one in cut_layers(model).values())
    routed = tuple(
        (one.mode, one.tau, getattr(one, "packed", None)) for one in model.modules() if isinstance(one, Selecting)
    )
    return (
        tensors,
        modules,
        cuts,
        routed,
        model.config._attn_implementation,
        model.dtype,
        torch.is_inference_mode_enabled(),
    )
