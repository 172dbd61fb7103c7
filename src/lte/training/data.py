"""From sources to a dataset for `transformers.Trainer`: language modelling, generation, labelled texts."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from lte.training.batches import IGNORED, PackedBlocks, PaddedRows
from lte.training.chat import chats_of, pairs_to_chats, render_chats
from lte.training.columns import render
from lte.training.data_config import DataConfig
from lte.training.labelled import classification_rows, regression_rows
from lte.training.rows import check_token_ids, collator_for, warn_cut, warn_skipped
from lte.training.sources import Row, Source, as_list, extension, read_rows, read_text, read_token_ids
from lte.training.tokenise import encode, eos_id, tokenise_documents, wrapping

logger = logging.getLogger(__name__)

Task = Literal["language_modelling", "generation", "classification", "regression"]


def load_dataset_for(
    task: Task,
    sources: Source | Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig | None = None,
    *,
    is_encoder_decoder: bool = False,
    vocab_size: int | None = None,
    labelled: bool = True,
) -> PackedBlocks | PaddedRows:
    """Read `sources` (files or hub data sets) and tokenise them for `task`.

    language_modelling: documents, each with the tokenizer's BOS if it has one, joined with EOS and packed.
    generation: prompt, completion, EOS, the loss on the last two; a row too long loses the start of its
    prompt, then the end of its completion. With `is_encoder_decoder` the prompt goes to the encoder, the
    labels are the completion alone, and each loses its end. classification: one text or a pair, a class.
    regression: the same with a number.

    Args:
        vocab_size: that of the model, to refuse token ids beyond it; the tokenizer's where not given.
        labelled: False for classification and regression rows that need no label, and then have none: those that
            thresholds are set on.
    Returns: a dataset with `.collator`, and for classification `.class_names`: the model's head needs
        `num_labels=len(dataset.class_names)`.
    Raises: ValueError, FileNotFoundError or ImportError, in one line that says what is wrong and the fix.
    """
    config = config or DataConfig()
    vocab_size = vocab_size or max(tokenizer.get_vocab().values()) + 1  # len() would not count gaps in the ids
    if task == "language_modelling":
        if is_encoder_decoder:
            raise ValueError("an encoder-decoder model learns generation: give prompt and completion")
        return _packed_blocks(sources, tokenizer, config, vocab_size)
    if task == "generation":
        texts = load_prompts(sources, config, tokenizer)
        return generation_rows(*texts, tokenizer, config, is_encoder_decoder, vocab_size)
    if task in ("classification", "regression"):
        rows = classification_rows if task == "classification" else regression_rows
        dataset = rows(sources, tokenizer, config, labelled)
        check_token_ids(dataset.columns["input_ids"], vocab_size, "the tokenizer")
        return dataset
    raise ValueError(f"unknown task {task!r}: use one of {', '.join(get_args(Task))}")


def load_texts(
    sources: Source | Sequence[Source],
    text_column: str = "text",
    rows: Callable[[Source], list[Row]] = read_rows,
) -> list[str]:
    """The documents of all sources, in order: a `.txt` file is one, each of the `rows` of another source is one.

    Rows whose text is empty are skipped, counted and warned of; ValueError when none is left.
    """
    texts: list[str] = []
    for source in as_list(sources):
        if extension(source) == ".txt":
            texts.append(read_text(source))
            continue
        found = render(rows(source), text_column, source)
        kept = [text for text in found if text.strip()]
        warn_skipped(len(found) - len(kept), len(found), f"{source}: rows with an empty {text_column!r}")
        texts += kept
    return texts


def load_prompts(
    sources: Source | Sequence[Source],
    config: DataConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[list[str], list[str]]:
    """(prompts, completions) as texts, without `completion_end` or the tokenizer's EOS at the end.

    Chats need the tokenizer, for its template.

    Rows with an empty completion are skipped, counted and warned of; ValueError when none is left.
    """
    config = config or DataConfig()
    prompts: list[str] = []
    completions: list[str] = []
    for source in as_list(sources):
        of_source = _prompts_of(source, config, tokenizer)
        prompts += of_source[0]
        completions += of_source[1]
    completions = _unmarked(completions, config, tokenizer)
    kept = [i for i, text in enumerate(completions) if text.strip()]
    warn_skipped(len(completions) - len(kept), len(completions), "rows with an empty completion")
    markers = Counter(m.group() for i in kept if (m := re.search(r"(<\|\w+\|>|</s>)$", completions[i])))
    for marker, count in markers.items():
        logger.warning("%d completions end with the text %r: completion_end removes it", count, marker)
    return [prompts[i] for i in kept], [completions[i] for i in kept]


def _prompts_of(
    source: Source, config: DataConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[list[str], list[str]]:
    rows = config.rows(source)
    if config.messages is None:
        texts = render(rows, config.prompt, source), render(rows, config.completion, source)
        if (end := config.completion_end) and not any(text.endswith(end) for text in texts[1]):
            logger.warning("%s: no completion ends with completion_end, %r", source, end)
        if not config.chat:
            return texts
        texts = texts[0], _unmarked(texts[1], config, tokenizer)  # a template puts its own end behind
        kept = [i for i, text in enumerate(texts[1]) if text.strip()]  # and would make something of nothing
        warn_skipped(len(texts[1]) - len(kept), len(texts[1]), "rows with an empty completion")
        chats = pairs_to_chats(*([side[i] for i in kept] for side in texts))
    else:
        chats = chats_of(rows, config.messages, source)
    if tokenizer is None:
        raise ValueError("chats need the tokenizer, for its template: load_prompts(sources, config, tokenizer)")
    return render_chats(chats, tokenizer)


def _unmarked(completions: list[str], config: DataConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Without `completion_end` and the tokenizer's EOS at the end."""
    eos_token = None if tokenizer is None else str(tokenizer.eos_token or "")
    for marker in filter(None, (config.completion_end, eos_token)):
        completions = [text.removesuffix(marker) for text in completions]
    return completions


def _packed_blocks(
    sources: Source | Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    vocab_size: int,
) -> PackedBlocks:
    documents: list[np.ndarray] = []
    for source in as_list(sources):
        if extension(source) == ".npy":
            found = [read_token_ids(source)]
        else:
            found = tokenise_documents(load_texts(source, config.text_column, config.rows), tokenizer)
        check_token_ids(found, vocab_size, source)
        documents += found
    ids = documents[0]  # one .npy stays memory-mapped
    if len(documents) > 1:
        eos = np.array([eos_id(tokenizer)], dtype=np.uint32)
        joined = [ids]
        for before, after in pairwise(documents):
            joined += [after] if before[-1] == eos or after[0] == eos else [eos, after]
        ids = np.concatenate(joined, dtype=np.uint32)
    if ids.dtype == np.uint32 and ids.max() < 2**16:
        ids = ids.astype(np.uint16)
    dataset = PackedBlocks(ids, config.sequence_length)
    left_out = len(ids) - len(dataset.ids)
    logger.info("%d blocks of %d tokens, the last %d tokens left out", len(dataset), config.sequence_length, left_out)
    return dataset


def generation_rows(
    prompts: Sequence[str],
    completions: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    is_encoder_decoder: bool,
    vocab_size: int,
) -> PaddedRows:
    """The dataset of texts, as `load_dataset_for` makes it of sources for the task generation."""
    size, total = config.sequence_length, len(prompts)
    start, end = wrapping(tokenizer)
    target_start, target_end = wrapping(tokenizer, target=True) if is_encoder_decoder else ([], [])
    target_end = target_end or [eos_id(tokenizer)]
    input_ids: list[np.ndarray] = []  # arrays, as lists of ints take many times the memory
    labels: list[np.ndarray] = []
    cut_prompts = cut_completions = 0
    # Prompt and completion are tokenised apart: in generation, too, the prompt is tokenised alone.
    encoded = zip(encode(prompts, tokenizer), encode(completions, tokenizer, target=True), strict=True)
    for prompt, completion in encoded:
        if is_encoder_decoder:
            prompt_room = size - len(start) - len(end)
            target_room = size - len(target_start) - len(target_end)
            inputs = start + prompt[:prompt_room] + end
            answer = target_start + completion[:target_room] + target_end
            ignored = 0
            cut_completions += len(completion) > target_room
        else:
            # A completion that is cut must not end in EOS: it would teach to stop in the middle.
            answer = (completion + target_end)[: size - len(start)]
            prompt_room = size - len(start) - len(answer)
            context = start + prompt[max(0, len(prompt) - prompt_room) :]
            inputs, ignored = context + answer, len(context)
            cut_completions += len(answer) <= len(completion)
        cut_prompts += len(prompt) > prompt_room
        input_ids.append(np.array(inputs, dtype=np.int32))
        labels.append(np.array([IGNORED] * ignored + answer, dtype=np.int32))
    warn_cut(cut_prompts, total, "prompts", size)
    warn_cut(cut_completions, total, "completions", size)
    check_token_ids(input_ids, vocab_size, "the tokenizer")
    return PaddedRows({"input_ids": input_ids, "labels": labels}, collator_for(tokenizer, config.pad_to_multiple_of))
