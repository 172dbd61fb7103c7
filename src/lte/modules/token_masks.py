"""The tokens of a forward pass that are not padding. Padding is left out of all records and comparisons."""

import inspect

import torch
from torch import Tensor, nn


class TokenMasks:
    """The tokens of a forward pass that are not padding, from the masks and labels that the model got."""

    def __init__(self, model: nn.Module) -> None:
        # also under DDP or a LoRA wrapper; getattr of a missing attribute of a module would be slow
        configs = (vars(part).get("config") for part in model.modules())
        self.encoder_decoder = any(getattr(config, "is_encoder_decoder", False) for config in configs)
        self._masks: dict[str, Tensor | None] = {}

    def see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Take the masks from the arguments of a forward pass."""
        given = dict(kwargs)
        if args:
            given |= inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        mask, decoder_mask = given.get("attention_mask"), given.get("decoder_attention_mask")
        labels = given.get("labels")
        if decoder_mask is None and self.encoder_decoder:
            if isinstance(labels, Tensor) and labels.ndim == 2:
                decoder_mask = labels.ne(-100)  # the decoder reads the labels, shifted to the right
            elif given.get("decoder_input_ids") is None and isinstance(mask, Tensor) and mask.ndim == 2:
                decoder_mask = nn.functional.pad(mask, (1, -1), value=1)  # a classifier's: the text, shifted
        self._masks = {"encoder": mask, "decoder": decoder_mask}

    def is_decoder(self, name: str) -> bool:
        """Return whether layer ``name`` is in the decoder of an encoder-decoder."""
        return self.encoder_decoder and "decoder" in name.split(".")

    def of(self, name: str, leading: torch.Size) -> Tensor | None:
        """Return the mask of layer ``name`` in the ``leading`` shape of its tokens; None if no token is padding."""
        mask = self._masks.get("decoder" if self.is_decoder(name) else "encoder")
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return None
        length = leading.numel() // mask.shape[0]
        if length > mask.shape[1]:  # prompt tuning adds tokens at the start
            mask = nn.functional.pad(mask, (length - mask.shape[1], 0), value=1)
        return mask[:, -length:].reshape(leading)  # with a KV cache the mask is longer than the new tokens
