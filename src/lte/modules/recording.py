"""Records router scores during forward passes and measures their sparsity. Padding does not count."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lte.core.accounting import count_active
from lte.core.selection import threshold
from lte.modules.input_threshold import CUT
from lte.modules.kept import kept
from lte.modules.sparse_ffn import Selecting
from lte.modules.token_masks import TokenMasks


def sparse_layers(model: nn.Module) -> dict[str, Selecting]:
    """Return the model's sparse FFNs by module name, in the order of the layers.

    Raises:
        ValueError: the model has none, because it is dense or TEAL's.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Selecting)}
    if not found and any(name.rpartition(".")[2] == CUT for name, _ in model.named_buffers()):
        raise ValueError(
            f"{type(model).__name__} has no sparse FFN but TEAL's thresholds: use it as it is, or convert the dense "
            "model again"
        )
    if not found:
        raise ValueError(f"{type(model).__name__} has no sparse FFN: call lte.sparsify_(model, lte.LTEConfig()) first")
    return found


def check_lte_routers(layers: Iterable[Selecting], consequence: str) -> None:
    """Raise ValueError unless all routers are LTE's, which are one linear map and a sigmoid.

    Args:
        consequence: the end of the message.
    """
    other = next((layer.router for layer in layers if not layer.router.is_lte), None)
    if other is not None:
        raise ValueError(f"this model's experts are chosen by {type(other).__name__}, not LTE's router: {consequence}")


def check_hard(layers: Iterable[Selecting], because: str) -> None:
    """Raise ValueError unless all layers are in mode hard. ``because`` is the reason in the message."""
    modes = sorted({layer.mode for layer in layers} - {"hard"})
    if modes:
        raise ValueError(
            f"the model is in mode {modes[0]}, {because}: train it first (lte.LTETrainer ends in mode hard), or switch "
            'a trained one with lte.set_mode_(model, "hard")'
        )


class Recording:
    """The result of one forward pass: scores by layer (with gradient), and which tokens are not padding."""

    def __init__(self, model: nn.Module, layers: dict[str, Selecting]) -> None:
        self._layers = layers
        self._kept: dict[str, list[Tensor]] = {name: [] for name in layers}
        self.masks = TokenMasks(model)
        self.thread = threading.get_ident()
        self._running: nn.Module | None = None
        self._with_gradient = False
        self._after: list[Callable[[], None]] = []

    @property
    def scores(self) -> dict[str, Tensor]:
        """The scores ``[..., E]`` of each layer that ran, by name.

        Raises:
            ValueError: gradients are on, but the scores have none because of reentrant checkpointing.
        """
        if self._with_gradient and torch.is_grad_enabled():
            self._check_gradient()
        return {n: one[0] if len(one) == 1 else torch.cat(one, dim=-2) for n, one in self._kept.items() if one}

    def mask(self, name: str) -> Tensor | None:
        """Return the tokens of layer ``name`` that are not padding, in the shape of its scores without ``E``.

        Return None if the model got no 2-D attention mask. Then every token counts.
        """
        return self.masks.of(name, self.scores[name].shape[:-1])

    def stacked(self) -> list[tuple[list[str], Tensor, Tensor | None]]:
        """Return the scores of all layers in few tensors: (names, scores ``[L, ..., E]``, mask) of similar layers.

        A decoder-only model has one entry, and an encoder-decoder has two.
        """
        alike: dict[tuple[bool, torch.Size], list[str]] = {}
        scores = self.scores
        for name, one in scores.items():
            alike.setdefault((self.masks.is_decoder(name), one.shape), []).append(name)
        return [
            (names, torch.stack([scores[n] for n in names]), self.masks.of(names[0], shape[:-1]))
            for (_, shape), names in alike.items()
        ]

    def _check_gradient(self) -> None:
        for name, layer in self._layers.items():
            learning = layer.mode != "dense" and any(weight.requires_grad for weight in layer.router.parameters())
            if learning and any(one.is_floating_point() and not one.requires_grad for one in self._kept[name]):
                raise ValueError(
                    f"the scores of {name} have no gradient in a pass with gradients: reentrant checkpointing "
                    'removes it, so call model.gradient_checkpointing_enable({"use_reentrant": False}), or read scores '
                    "under torch.no_grad()"
                )

    def _elsewhere(self) -> bool:
        return not torch.compiler.is_compiling() and threading.get_ident() != self.thread

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._running is None and not self._elsewhere():
            self._running = module
            self._with_gradient = torch.is_grad_enabled()
            for scores in self._kept.values():
                scores.clear()
            self.masks.see(module, args, kwargs)

    def _end(self, module: nn.Module, _args: tuple, output: Any) -> None:
        if self._running is module and not self._elsewhere():
            self._running = None
            if output is not None:  # None: the forward pass raised
                for call in self._after:
                    call()


@contextmanager
def record_scores(model: nn.Module) -> Iterator[Recording]:
    """Record the router scores of each forward pass of ``model`` inside the context. It gives the recording.

    A layer's scores are ``[..., E]``, of the last forward pass, and they have a gradient. Layers in mode dense record
    scores of 1. With non-reentrant gradient checkpointing, read the recording and leave the context before
    ``backward``. Contexts may be nested.

    Other threads may run and record the model at the same time. A recording has only the passes of the thread that
    opened it. A compiled model knows no threads: while one thread records it, no other thread may run it.
    """
    layers = sparse_layers(model)
    recording = Recording(model, layers)
    with ExitStack() as hooks:
        for module in _entries(model, recording.masks.encoder_decoder):
            begin = module.register_forward_pre_hook(recording._begin, with_kwargs=True, prepend=True)
            end = module.register_forward_hook(recording._end, always_call=True)
            hooks.callback(begin.remove)
            hooks.callback(end.remove)
        hooks.enter_context(kept((layer, recording._kept[name]) for name, layer in layers.items()))
        yield recording


def _entries(model: nn.Module, encoder_decoder: bool) -> list[nn.Module]:
    """Return the modules that start a forward pass: the model, and an encoder, which ``generate`` calls directly."""
    get_encoder = getattr(model, "get_encoder", None)
    return [model, get_encoder()] if encoder_decoder and get_encoder is not None else [model]


class SparsityMeter:
    """Counts active neurons over forward passes.

    Attributes:
        weight: how often each token of the next passes counts: more than once if a pass stands for several.
    """

    def __init__(self) -> None:
        self.weight = 1
        self._active: dict[str, Tensor] = {}
        self._total: dict[str, Tensor] = {}

    def add(self, layers: dict[str, Selecting], stacked: list[tuple[list[str], Tensor, Tensor | None]]) -> None:
        """Count a forward pass. ``stacked`` is the result of :meth:`Recording.stacked`."""
        for names, scores, mask in stacked:
            self.add_counts(names, *count_active(threshold(scores, layers[names[0]].tau), mask))

    def add_counts(self, names: list[str], active_L: Tensor, total: Tensor) -> None:
        """Add the result of :func:`~lte.core.accounting.count_active` for some layers."""
        active_L, total = self.weight * active_L, self.weight * total
        for name, active in zip(names, active_L.unbind(), strict=True):
            self._active[name] = self._active[name] + active if name in self._active else active
            self._total[name] = self._total[name] + total if name in self._total else total

    def counts(self) -> Tensor:
        """Return active and all neurons of each layer, ``[2, L]``, on the device, without waiting for it."""
        return torch.stack([torch.stack(list(one.values())) for one in (self._active, self._total)])

    def measured(self) -> tuple[Tensor, Tensor]:
        """Return sparsity overall (a scalar) and of each layer ``[L]``, on the device."""
        active_L, total_L = self.counts()
        return 1 - active_L.sum() / total_L.sum(), 1 - active_L / total_L

    @property
    def by_layer(self) -> list[float]:
        """Sparsity of each layer, in order. Empty before the first forward pass."""
        return self.measured()[1].tolist() if self._active else []

    @property
    def overall(self) -> float:
        """Fraction of inactive neurons, mean over tokens and layers; NaN before the first forward pass."""
        return self.measured()[0].item() if self._active else float("nan")


@contextmanager
def track_sparsity(model: nn.Module) -> Iterator[SparsityMeter]:
    """Measure sparsity over all forward passes inside the context: ``.overall`` and ``.by_layer``.

    An expert counts as active if its score is above tau, in mode soft too. In mode dense all experts are active.
    Padding, which the attention mask says, does not count.
    """
    layers = sparse_layers(model)
    meter = SparsityMeter()
    with record_scores(model) as recording:

        @torch.no_grad()
        def count() -> None:
            meter.add(layers, recording.stacked())

        recording._after.append(count)
        yield meter
