"""The quality of generated texts, with the sparsity and cost of generating them."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lte.data.tokenise import encode, most_tokens, without_start, wrapping
from lte.evaluation.measuring import Spent, measure, spent
from lte.evaluation.text_metrics import TextMetrics
from lte.inference.completions import GREEDY, Completion, complete, padded, replay, stop_ids
from lte.surgery.conversion import is_sparse

logger = logging.getLogger(__name__)

PLAIN: dict[str, Any] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": None}
"""Settings that a checkpoint may have, and that plain greedy decoding ignores."""
COMPILED_FROM = 4096
"""Steps from which compiling them is worth its minute or more: it saves some 20 ms of each."""


@dataclass(kw_only=True)
class GenerationEvaluation(Spent):
    """The result of an evaluation of generated texts. Sparsity is that of prompts and texts.

    Attributes:
        rouge1, rouge2, rougeL: F1 in points of 100, the best over a prompt's references, mean over prompts.
        bleu: of all texts together, against all references, in points of 100.
        num_prompts, num_references: their numbers.
        num_tokens: number of generated tokens, including the ends of texts.
        ended: share of the texts that ended. The others have ``max_new_tokens`` tokens.
        predictions: the texts, in the order of the prompts.
    """

    rouge1: float
    rouge2: float
    rougeL: float
    bleu: float
    num_prompts: int
    num_references: int
    num_tokens: int
    ended: float
    predictions: list[str] = field(repr=False)


def group_references(prompts: Sequence[str], completions: Sequence[str]) -> dict[str, list[str]]:
    """Return each prompt once, in its first order, with all its completions."""
    references: dict[str, list[str]] = {}
    for prompt, completion in zip(prompts, completions, strict=True):
        references.setdefault(prompt, []).append(completion)
    return references


@torch.no_grad()
def evaluate_generation(
    model: PreTrainedModel,
    references: Mapping[str, Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    num_beams: int = 1,
    sequence_length: int = 1024,
    compile: bool | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> GenerationEvaluation:
    """Complete every prompt in the model's current mode and compare the texts with the references.

    Prompts are tokenised as in training. A prompt that leaves no room for ``max_new_tokens`` in ``sequence_length`` (or
    in the model's positions) loses its start, as in training. An encoder's prompt has all the room and loses its end.

    Args:
        model: with a language modelling head, on any device. Decoding is fastest after :func:`lte.optimize_`.
        references: one or several right completions of each prompt; see :func:`group_references`.
        tokenizer: the model's.
        batch_size: prompts decoded together.
        max_new_tokens: the most tokens of a text.
        num_beams: 1 is greedy.
        sequence_length: the most tokens of a row, as in training.
        compile: as for :func:`lte.generate`, but None compiles only if there are many steps.
        progress: wraps the iteration over batches, first of decoding, then of measuring sparsity.

    Raises:
        ValueError: there is no prompt, a prompt has no tokens, or there is no room for prompts.
        ImportError: rouge-score or sacrebleu is not installed.
    """
    if not references:
        raise ValueError("there is no prompt to complete")
    metrics = TextMetrics()
    was_training = model.training
    model.eval()
    room = min(sequence_length, most_tokens(tokenizer, model.config))
    inputs = _encode(list(references), tokenizer, room, max_new_tokens, model.config.is_encoder_decoder)
    if compile is None and -(-len(inputs) // batch_size) * max_new_tokens < COMPILED_FROM:
        compile = False
    decoding = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "compile": compile}
    completions = _complete(model, inputs, tokenizer, batch_size, progress, **decoding)
    with measure(model, entry=model.base_model) as meter:
        if is_sparse(model.config):
            replay(model, completions, batch_size, progress)
    model.train(was_training)
    decode: Any = tokenizer.decode  # of one row a text, which a checker does not know
    texts = [decode(one.new, skip_special_tokens=True).strip() for one in completions]
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    wanted = [[_without(special, one) for one in several] for several in references.values()]
    return GenerationEvaluation(
        **metrics(texts, wanted),
        num_prompts=len(references),
        num_references=sum(map(len, references.values())),
        num_tokens=sum(len(one.new) for one in completions),
        ended=sum(one.ended for one in completions) / len(completions),
        predictions=texts,
        **vars(spent(model, meter)),
    )


def _without(special: Sequence[str], text: str) -> str:
    """Return a reference as decoding would give it: without an end of turn, which is one token."""
    for token in special:
        text = text.replace(token, "")
    return text


def _encode(
    prompts: list[str], tokenizer: PreTrainedTokenizerBase, room: int, max_new_tokens: int, encoder_decoder: bool
) -> list[torch.Tensor]:
    """Return the token ids ``[T]`` of each prompt, as training rows begin."""
    start, end = wrapping(tokenizer)
    end = end if encoder_decoder else []
    free = room - len(start) - len(end) - (0 if encoder_decoder else max_new_tokens)
    if free < 1:
        raise ValueError(
            f"max_new_tokens {max_new_tokens} of a sequence_length of {room} leave no room for a prompt: "
            "give a smaller max_new_tokens, or a larger sequence_length if the model has the positions"
        )
    encoded, cut = [], 0
    for written in encode(prompts, tokenizer):
        prompt = without_start(written, start)
        cut += len(prompt) > free
        kept = prompt[:free] if encoder_decoder else prompt[-free:]
        if not (start or kept or end):
            raise ValueError("a prompt is empty: give some text to continue")
        encoded.append(torch.tensor(start + kept + end))
    if cut:
        logger.warning("%d of %d prompts cut to %d tokens", cut, len(prompts), free)
    return encoded


def _complete(
    model: PreTrainedModel,
    inputs: list[torch.Tensor],
    tokenizer: Any,
    batch_size: int,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
    **options: Any,
) -> list[Completion]:
    """Longest prompts first: less padding, a static cache that never grows, and no surprise of memory at the end."""
    stops = stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id
    pad = pad if pad is not None else next(iter(stops), 0)
    order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))
    side = "right" if model.config.is_encoder_decoder else "left"
    made: dict[int, Completion] = {}
    for first in progress(range(0, len(order), batch_size)):
        batch = order[first : first + batch_size]
        rows = padded([inputs[i] for i in batch], side, pad)
        made |= zip(batch, complete(model, rows, stops, pad_token_id=pad, **GREEDY, **PLAIN, **options), strict=True)
    return [made[i] for i in range(len(inputs))]
