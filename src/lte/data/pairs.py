"""Prompts and completions as rows of token ids. The loss is only on the completion and EOS."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from lte.data.batches import IGNORED
from lte.data.rows import check_token_ids, warn_cut
from lte.data.tokenise import BATCH_ROWS, encode, eos_id, without_start, wrapping


def tokenised_pairs(
    pairs: Iterable[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    size: int,
    is_encoder_decoder: bool,
    vocab_size: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Give a row {"input_ids": (L,), "labels": (L,)} int32 for each (prompt, completion), of at most `size` tokens.

    Prompt and completion are tokenised separately, because generation tokenises the prompt alone too.
    """
    start, end = wrapping(tokenizer)
    target_start, target_end = wrapping(tokenizer, target=True) if is_encoder_decoder else ([], [])
    target_end = target_end or [eos_id(tokenizer)]
    total = cut_prompts = cut_completions = 0
    for written, completion in _encoded(pairs, tokenizer):
        prompt = without_start(written, start)
        if is_encoder_decoder:
            prompt_room = size - len(start) - len(end)
            target_room = size - len(target_start) - len(target_end)
            inputs = start + prompt[:prompt_room] + end
            answer = target_start + completion[:target_room] + target_end
            ignored = 0
            cut_completions += len(completion) > target_room
        else:
            # A completion that is cut must not end in EOS: the model would learn to stop in the middle.
            answer = (completion + target_end)[: size - len(start)]
            prompt_room = size - len(start) - len(answer)
            context = start + prompt[max(0, len(prompt) - prompt_room) :]
            inputs, ignored = context + answer, len(context)
            cut_completions += len(answer) <= len(completion)
        cut_prompts += len(prompt) > prompt_room
        total += 1
        input_ids = np.array(inputs, dtype=np.int32)
        check_token_ids([input_ids], vocab_size, "the tokenizer")
        yield {"input_ids": input_ids, "labels": np.array([IGNORED] * ignored + answer, dtype=np.int32)}
    warn_cut(cut_prompts, total, "prompts", size)
    warn_cut(cut_completions, total, "completions", size)


def _encoded(
    pairs: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int]]]:
    left = iter(pairs)
    while batch := list(islice(left, BATCH_ROWS)):
        prompts, completions = zip(*batch, strict=True)
        yield from zip(encode(prompts, tokenizer), encode(completions, tokenizer, target=True), strict=True)
