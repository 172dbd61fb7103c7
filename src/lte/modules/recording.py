"""Records router scores during forward passes and measures their sparsity. Padding does not count."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lte.modules.input_threshold import cut_layers
from lte.modules.kept import kept
from lte.modules.sparse_ffn import Selecting
from lte.modules.sparsity_meter import SparsityMeter
from lte.modules.tensor_parallel import check_not_shared
from lte.modules.token_masks import TokenMasks


def sparse_layers(model: nn.Module) -> dict[str, Selecting]:
    """Return the model's sparse FFNs by module name, in the order of the layers.

    Raises:
        ValueError: the model has none, because it is dense or TEAL's.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Selecting)}
    if not found and cut_layers(model):
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
    """The result of one forward pass: scores by layer (with gradient), and which tokens are not padding.

    Attributes:
        zeros: of each layer with a threshold on its inputs that is recorded, the number of zeros of each token.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Selecting], linears: Iterable[str]) -> None:
        self._layers = layers
        self._kept: dict[str, list[Tensor]] = {name: [] for name in layers}
        self.zeros: dict[str, list[Tensor]] = {name: [] for name in linears}
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
            for values in (*self._kept.values(), *self.zeros.values()):
                values.clear()
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
    with _recording(model, sparse_layers(model)) as recording:
        yield recording


@contextmanager
def _recording(
    model: nn.Module, layers: Mapping[str, Selecting], linears: Mapping[str, nn.Module] | None = None
) -> Iterator[Recording]:
    linears = linears or {}
    recording = Recording(model, layers, linears)
    with ExitStack() as hooks:
        for module in _entries(model, recording.masks.encoder_decoder):
            begin = module.register_forward_pre_hook(recording._begin, with_kwargs=True, prepend=True)
            end = module.register_forward_hook(recording._end, always_call=True)
            hooks.callback(begin.remove)
            hooks.callback(end.remove)
        hooks.enter_context(kept((layer, recording._kept[name]) for name, layer in layers.items()))
        hooks.enter_context(kept((linear, recording.zeros[name]) for name, linear in linears.items()))
        yield recording


def _entries(model: nn.Module, encoder_decoder: bool) -> list[nn.Module]:
    """Return the modules that start a forward pass: the model, and an encoder, which ``generate`` calls directly."""
    get_encoder = getattr(model, "get_encoder", None)
    return [model, get_encoder()] if encoder_decoder and get_encoder is not None else [model]


@contextmanager
def track_sparsity(model: nn.Module) -> Iterator[SparsityMeter]:
    """Measure sparsity over all forward passes inside the context: ``.overall`` and ``.by_layer``.

    An expert counts as active if its score is above tau, in mode soft too. In mode dense all experts are active.
    Padding, which the attention mask says, does not count. ``.attention_sparsity`` is the fraction of the attention
    projections' weights that zeros leave unread, if the model has thresholds there (``attention_sparsity`` of
    :class:`~lte.LTEConfig`). Otherwise it is 0.
    """
    layers = sparse_layers(model)
    with _counting(model, layers, cut_layers(model)) as meter:
        yield meter


@contextmanager
def track_inputs(model: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[SparsityMeter]:
    """Count the inputs of ``linears`` that are 0, over all forward passes of ``model`` inside the context.

    Padding, which the attention mask says, does not count. Layers that do not apply their threshold do not count.

    Raises:
        ValueError: the model is divided by tensor parallelism, so a process sees only some of a layer's inputs.
    """
    with _counting(model, {}, linears) as meter:
        yield meter


@contextmanager
def _counting(
    model: nn.Module, layers: dict[str, Selecting], linears: Mapping[str, nn.Module]
) -> Iterator[SparsityMeter]:
    """Count active neurons of ``layers`` and zeros of ``linears``, over all forward passes of ``model``."""
    if linears:
        check_not_shared(model, "counting inputs wants")
    meter = SparsityMeter(linears)
    with _recording(model, layers, linears) as recording:

        @torch.no_grad()
        def count() -> None:
            meter.add(layers, recording.stacked())
            for name, passes in recording.zeros.items():
                for zeros_T in passes:
                    meter.add_zeros(name, zeros_T, recording.masks.of(name, zeros_T.shape))

        recording._after.append(count)
        yield meter
