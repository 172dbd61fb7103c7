"""The work of a model's routers on a text: scores, active experts of each token, the union over a batch."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lte.data.tokenise import most_tokens, wrapping
from lte.modules.recording import record_scores, sparse_layers
from lte.modules.sparse_ffn import Mode
from lte.surgery.convert import set_mode_

BINS = 20
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Routing:
    """The result of one pass over a text.

    Attributes:
        pieces: the text, cut into the model's tokens.
        layers: the names of the layers.
        active: whether each expert is active, ``[T, E]`` booleans for each layer.
        histogram: for each layer, the share of its scores in each of ``BINS`` equal bins from 0 to 1.
        mode: the mode in which the model ran.
        tau: the score above which an expert is active.
    """

    pieces: tuple[str, ...]
    layers: tuple[str, ...]
    active: tuple[Tensor, ...]
    histogram: tuple[tuple[float, ...], ...]
    mode: Mode
    tau: float

    @property
    def histogram_overall(self) -> list[float]:
        """The mean over layers."""
        return [statistics.mean(shares) for shares in zip(*self.histogram, strict=True)]

    @property
    def sparsity(self) -> float:
        return statistics.mean(1 - one.float().mean().item() for one in self.active)


@torch.no_grad()
def routing_on(model: PreTrainedModel, tokenizer: Any, text: str, max_tokens: int) -> Routing:
    """Run ``model`` on the start of ``text``, up to its number of positions, and return what its routers did.

    A model in mode dense runs in mode soft. The decoder of an encoder-decoder gets the same text.

    Raises:
        ValueError: the model has no routers, or the text has no token.
    """
    layers = sparse_layers(model)
    max_tokens = min(max_tokens, most_tokens(tokenizer, model.config))
    start = [] if model.config.is_encoder_decoder else wrapping(tokenizer)[0]  # only context, not shown
    max_tokens -= len(start)
    ids = tokenizer(text, truncation=True, max_length=max_tokens, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError("the text is empty: give a file with some words in it")
    before: dict[str, Mode] = {name: layer.mode for name, layer in layers.items()}
    if "dense" in before.values():
        set_mode_(model, "soft")
    mode = next(iter(layers.values())).mode
    model.eval()
    inputs = {"input_ids": torch.tensor([start + ids], device=model.device)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with record_scores(model) as recording:
        model(**inputs)
    scores = {name: one.float().flatten(0, -2)[len(start) :].cpu() for name, one in recording.scores.items()}
    for name, layer in layers.items():
        layer.set_mode(before[name])
    return Routing(
        pieces=tuple(_pieces(tokenizer, text, ids, max_tokens)),
        layers=tuple(scores),
        active=tuple(one > layers[name].tau for name, one in scores.items()),
        histogram=tuple(histogram(one) for one in scores.values()),
        mode=mode,
        tau=next(iter(layers.values())).tau,
    )


def histogram(scores_TE: Tensor) -> tuple[float, ...]:
    """Return the share of the scores in each of ``BINS`` equal bins from 0 to 1. The last bin includes 1."""
    counts = torch.histc(scores_TE.float(), bins=BINS, min=0, max=1)
    return tuple((counts / scores_TE.numel()).tolist())


def union_sparsity(active_TE: Tensor, batch: int) -> float:
    """Return the share of experts that no token of a batch uses, as a mean over all batches.

    A batch is any choice of ``batch`` of the ``T`` tokens. An expert that ``k`` tokens use stays idle in
    ``C(T - k, B) / C(T, B)`` of the batches.
    """
    tokens = len(active_TE)
    assert 1 <= batch <= tokens
    unused_E = tokens - active_TE.sum(0).double()
    idle_E = torch.ones_like(unused_E)
    for drawn in range(batch):
        idle_E *= ((unused_E - drawn) / (tokens - drawn)).clamp(min=0)
    return idle_E.mean().item()


def union_by_batch(active: Sequence[Tensor]) -> dict[int, list[float]]:
    """Return :func:`union_sparsity` of each layer, for batches of up to half of the tokens."""
    tokens = len(active[0])
    sizes = [batch for batch in BATCHES if batch == 1 or 2 * batch <= tokens]
    return {batch: [union_sparsity(one, batch) for one in active] for batch in sizes}


def _pieces(tokenizer: Any, text: str, ids: Sequence[int], max_tokens: int) -> list[str]:
    """Return the piece of the text of each token. The pieces together are the whole text."""
    if not tokenizer.is_fast:
        return [tokenizer.decode([one]) for one in ids]
    offsets = tokenizer(
        text, truncation=True, max_length=max_tokens, add_special_tokens=False, return_offsets_mapping=True
    )["offset_mapping"]
    pieces, shown = [], 0
    for _, end in offsets:
        pieces.append(text[shown:end])
        shown = max(shown, end)
    return pieces
