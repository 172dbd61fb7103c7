"""Texts to token ids, in batches that bound memory, and the special tokens about them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 1000
_PIECE = 1 << 20  # characters


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, target: bool = False) -> Iterator[list[int]]:
    """The ids of each text without special tokens, in batches bounded by rows and by characters."""
    tokenise: Any = tokenizer  # its signature is wider than a checker can follow
    start = stop = 0
    while start < len(texts):
        characters = 0
        while stop < len(texts) and stop - start < BATCH_ROWS and characters < 4 * _PIECE:
            characters += len(texts[stop])
            stop += 1
        side = {"text_target" if target else "text": list(texts[start:stop])}
        yield from tokenise(
            **side,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning of texts beyond the model's length: they are cut after
        )["input_ids"]
        start = stop


def tokenise_documents(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """The ids (tokens,) uint32 of each text, after the tokenizer's BOS if it has one."""
    bos = np.array(wrapping(tokenizer)[0], dtype=np.uint32)
    pieces = [list(_pieces(text, tokenizer)) for text in texts]
    encoded = encode([piece for of_text in pieces for piece in of_text], tokenizer)
    documents = (
        np.concatenate([bos, *(np.array(ids, dtype=np.uint32) for ids in islice(encoded, len(of_text)))])
        for of_text in pieces
    )
    return [ids for ids in documents if len(ids)]


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase, size: int = _PIECE) -> Iterator[str]:
    """`text` cut at line ends into pieces of about `size` characters whose tokens are those of the whole.

    A tokenizer takes hundreds of bytes a token while it works, so a large file must not be one text. Each
    cut is tried on the characters about it; where none of them keeps the tokens (a tokenizer that marks
    the start of a text) the rest stays whole.
    """
    start = 0
    while len(text) - start > 2 * size:
        for match in islice(re.compile(r"\n(?=[^\r\n])").finditer(text, start + size), 64):
            left, right = text[match.end() - 256 : match.end()], text[match.end() : match.end() + 256]
            whole, *halves = encode([left + right, left, right], tokenizer)
            if whole == halves[0] + halves[1]:
                break
        else:
            break
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def wrapping(tokenizer: PreTrainedTokenizerBase, target: bool = False) -> tuple[list[int], list[int]]:
    """The special tokens the tokenizer itself puts before and after a text."""
    side = {"text_target" if target else "text": "a"}
    tokenise: Any = tokenizer
    bare, full = (tokenise(**side, add_special_tokens=special)["input_ids"] for special in (False, True))
    places = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    if not bare or not places:
        raise ValueError(f"cannot tell the tokenizer's special tokens: 'a' is {full} with them, {bare} without")
    before = places[0]
    return full[:before], full[before + len(bare) :]


def most_tokens(tokenizer: PreTrainedTokenizerBase, model_config: Any) -> int:
    """The longest row that tokenizer and model take; a huge number where neither says."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    longest = tokenizer.model_max_length  # RoBERTa's config has two positions more than it can use
    return min(positions or longest, longest)


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of EOS; ValueError when the tokenizer has none."""
    eos: Any = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token: set tokenizer.eos_token")
    return eos
