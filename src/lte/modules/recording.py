"""Recording router scores during forward passes, and the sparsity they amount to. Padding is left out."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lte.core.accounting import count_active
from lte.core.selection import threshold
from lte.modules.sparse_ffn import Selecting


def sparse_layers(model: nn.Module) -> dict[str, Selecting]:
    """The model's places of selection by module name, in the order of the layers.

    Raises:
        ValueError: there are none: the model is dense.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Selecting)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no sparse FFN: call lte.sparsify_(model, lte.LTEConfig()) first")
    return found


class Recording:
    """What one forward pass showed: scores by layer (with gradient), and which tokens are real."""

    def __init__(self) -> None:
        self.scores: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor | None] = {}

    def _on_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.scores.clear()
        given = dict(kwargs)
        if args:
            given |= inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        decoder_mask = given.get("decoder_attention_mask")
        if decoder_mask is None and given.get("labels") is not None:
            decoder_mask = given["labels"].ne(-100)  # the decoder reads the labels shifted right
        self._masks = {"encoder": given.get("attention_mask"), "decoder": decoder_mask}

    def _on_scores(self, name: str, scores: Tensor) -> None:
        before = self.scores.get(name)  # set already when the model runs its FFN in chunks of the sequence
        self.scores[name] = scores if before is None else torch.cat([before, scores], dim=-2)

    def mask(self, name: str) -> Tensor | None:
        """The tokens of layer ``name`` that are not padding, shaped like its scores without the last dimension.

        None when the model was given no 2-D attention mask: every token counts.
        """
        is_decoder = self._encoder_decoder and "decoder" in name.split(".")
        mask = self._masks["decoder" if is_decoder else "encoder"]
        if mask is None or mask.ndim != 2:
            return None
        leading = self.scores[name].shape[:-1]
        length = leading.numel() // mask.shape[0]
        return mask[:, -length:].reshape(leading)  # with a KV cache the mask is longer than the new tokens

    _encoder_decoder = False


@contextmanager
def record_scores(model: nn.Module) -> Iterator[Recording]:
    """Within it, every forward pass of ``model`` leaves its router scores in the recording it yields.

    Scores are ``[..., E]`` a layer, of the last forward pass, and carry gradient. Layers in mode
    dense record scores of 1. Safe with non-reentrant gradient checkpointing when the recording is
    read before ``backward`` and left by then.
    """
    recording = Recording()
    recording._encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    layers = sparse_layers(model)
    hook = model.register_forward_pre_hook(recording._on_forward, with_kwargs=True, prepend=True)
    before = {name: layer.recorder for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.recorder = lambda scores, name=name: recording._on_scores(name, scores)
    try:
        yield recording
    finally:
        hook.remove()
        for name, layer in layers.items():
            layer.recorder = before[name]


class SparsityMeter:
    """Counts active neurons over forward passes."""

    def __init__(self) -> None:
        self._active: dict[str, Tensor] = {}
        self._total: dict[str, Tensor] = {}

    def add(self, layers: dict[str, Selecting], recording: Recording) -> None:
        for name, scores in recording.scores.items():
            active, total = count_active(threshold(scores, layers[name].tau), recording.mask(name))
            self._active[name] = self._active.get(name, 0) + active
            self._total[name] = self._total.get(name, 0) + total

    @property
    def by_layer(self) -> list[float]:
        """Sparsity of each layer, in order. Empty before the first forward pass."""
        if not self._active:
            return []
        return (1 - torch.stack(list(self._active.values())) / torch.stack(list(self._total.values()))).tolist()

    @property
    def overall(self) -> float:
        """Fraction of inactive neurons, mean over tokens and layers; NaN before the first forward pass."""
        if not self._active:
            return float("nan")
        return 1 - (sum(self._active.values()) / sum(self._total.values())).item()  # pyright: ignore


@contextmanager
def track_sparsity(model: nn.Module) -> Iterator[SparsityMeter]:
    """Measure sparsity over all forward passes made within: ``.overall`` and ``.by_layer``.

    An expert counts as active when its score is above tau, in soft mode too; in dense mode all are.
    Padding (by the attention mask given to the model) is not counted.
    """
    layers = sparse_layers(model)
    meter = SparsityMeter()
    with record_scores(model) as recording:
        hook = model.register_forward_hook(lambda *_: meter.add(layers, recording))
        try:
            yield meter
        finally:
            hook.remove()
