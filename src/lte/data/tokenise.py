"""Turns texts into token ids, in batches that limit memory. Also the special tokens around texts."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 1000
_PIECE = 1 << 18  # characters
_PIECES = min(
    16, max(4, os.cpu_count() or 1)
)  # at once: a tokenizer has a thread for each of them, and each takes about 80 MB at most
_LEAD = "a\n"
"""This text stands before a piece while it is tokenised, because some tokenizers mark the start of a text."""
_CUTS = tuple(map(re.compile, (r"\n(?=[^\r\n])", r"(?= )", r"")))  # from the best place to any place


def encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, target: bool = False) -> Iterator[list[int]]:
    """Give the ids of each text without special tokens. Batches are limited by rows and by characters.

    Raises:
        ValueError: a text that is not valid Unicode.
    """
    tokenise: Any = tokenizer  # the type checker cannot follow its signature
    for batch in _batches(texts):
        yield from tokenise(
            **{"text_target" if target else "text": batch},
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning of texts longer than the model takes: they are cut later
        )["input_ids"]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = list[str](), 0
    for text in texts:
        batch.append(as_unicode(text))
        characters += len(text)
        if len(batch) == BATCH_ROWS or characters >= _PIECES * _PIECE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def as_unicode(text: str) -> str:
    """Return the text. Raise ValueError if it holds half of a surrogate pair, which JSON and a shell can produce."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a text is not valid Unicode: {error}") from error
    return text


def tokenise_documents(
    documents: Iterable[Iterable[str]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[bool, np.ndarray]]:
    """Give the ids (tokens,) uint32 of documents in pieces. A piece comes with True if a document starts there.

    A document is an iterable of texts that belong together. It starts with the tokenizer's BOS if there is one. A BOS
    that the text holds itself is not doubled. A document without tokens is left out.
    """
    start = wrapping(tokenizer)[0]
    (lead,) = encode([_LEAD], tokenizer)
    begins: deque[bool] = deque()

    def pieces() -> Iterator[str]:
        for document in documents:
            first = True
            for piece in _pieces(document, tokenizer):
                begins.append(first)
                yield piece if first else _LEAD + piece
                first = False

    new = True
    for ids in encode(pieces(), tokenizer):
        first = begins.popleft()
        new = new or first
        kept = without_start(ids, start) if first else ids[len(lead) :]
        if kept:
            yield new, np.array([*start, *kept] if new else kept, dtype=np.uint32)
            new = False


def _pieces(document: Iterable[str], tokenizer: PreTrainedTokenizerBase, size: int = _PIECE) -> Iterator[str]:
    """Give the text of a document in pieces of `size` characters or slightly more, with the tokens of the whole text.

    All pieces except the first must be tokenised after `_LEAD`. A tokenizer needs hundreds of bytes for each token, so
    a large text must be divided. Each cut is tried on the characters around it. If no cut keeps the tokens, the text
    is not divided.
    """
    held, tried = "", size
    for part in document:
        for begin in range(0, len(part), size):
            held += part[begin : begin + size]
            while len(held) - tried > size:
                cut = _cut(held, tried, tokenizer)
                if cut is None:
                    tried = len(held) - size
                    break
                yield held[:cut]
                held, tried = held[cut:], size
    yield held


def _cut(text: str, start: int, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the first good place from `start` on where a cut does not change the tokens; None if there is none."""
    (lead,) = encode([_LEAD], tokenizer)
    for cuts in _CUTS:
        for place in (match.end() for match in islice(cuts.finditer(text, start, len(text) - 256), 64)):
            left, right = text[max(0, place - 256) : place], text[place : place + 256]
            whole, before, led = encode([left + right, left, _LEAD + right], tokenizer)
            if led[: len(lead)] == lead and whole == before + led[len(lead) :]:
                return place
    return None


def wrapping(tokenizer: PreTrainedTokenizerBase, target: bool = False) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    side = {"text_target" if target else "text": "a"}
    tokenise: Any = tokenizer
    bare, full = (tokenise(**side, add_special_tokens=special)["input_ids"] for special in (False, True))
    places = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    if not bare or not places:
        raise ValueError(f"cannot tell the tokenizer's special tokens: 'a' is {full} with them, {bare} without")
    before = places[0]
    return full[:before], full[before + len(bare) :]


def without_start(ids: list[int], start: list[int]) -> list[int]:
    """Return ids without a leading BOS (`start`), which a text or a template may hold. It is added once later."""
    return ids[len(start) :] if start and ids[: len(start)] == start else ids


def most_tokens(tokenizer: PreTrainedTokenizerBase, model_config: Any) -> int:
    """Return the length of the longest row that tokenizer and model take, or a huge number if neither says it.

    Raise ValueError if the model's config has a negative number of positions.
    """
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < 0:
        raise ValueError(f"{model_config.name_or_path}: config.json has max_position_embeddings {positions}")
    longest = tokenizer.model_max_length  # RoBERTa's config has two positions that it cannot use
    return min(positions or longest, longest)


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of EOS. Raise ValueError if the tokenizer has none."""
    eos: Any = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token: set tokenizer.eos_token")
    return eos
