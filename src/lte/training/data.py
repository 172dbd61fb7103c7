"""From sources to a dataset for `transformers.Trainer`: language modelling, generation, classification."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from lte.training.batches import IGNORED, PackedBlocks, PaddedRows, PaddingCollator
from lte.training.columns import column, render
from lte.training.sources import Source, as_list, extension, read_rows, read_text, read_token_ids
from lte.training.tokenise import BATCH_ROWS, encode, eos_id, tokenise_documents, wrapping

logger = logging.getLogger(__name__)

Task = Literal["language_modelling", "generation", "classification"]


@dataclass(frozen=True)
class DataConfig:
    """How to read rows and how long a sequence is; a field not for every task says for which it is."""

    sequence_length: int = 1024
    """Language modelling: the tokens of a block. Generation, classification: the most tokens of a row."""
    text_column: str = "text"
    """Language modelling, classification: the column of text; classification also takes a pair, `a,b`."""
    prompt: str = "prompt"
    """Generation: a column, or a template such as `"{instruction}\\n{input}\\n"`."""
    completion: str = "completion"
    """Generation: a column, or a template such as `"{output}"`."""
    completion_end: str | None = None
    """Generation: an end marker that completions carry as text (`<|endoftext|>`), to remove: EOS is added."""
    label_column: str = "label"
    """Classification: the column of labels, numbers or names."""
    class_names: tuple[str, ...] | None = None
    """Classification: labels in order of their ids, for evaluation those of training; None collects them."""

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length is {self.sequence_length}: it must be at least 2")
        if self.class_names is not None and len(set(self.class_names)) < max(2, len(self.class_names)):
            raise ValueError(f"class_names needs two or more names, each once, not {self.class_names}")


def load_dataset_for(
    task: Task,
    sources: Source | Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig | None = None,
    *,
    is_encoder_decoder: bool = False,
    vocab_size: int | None = None,
) -> PackedBlocks | PaddedRows:
    """Read `sources` (files or hub data sets) and tokenise them for `task`.

    language_modelling: documents, each with the tokenizer's BOS if it has one, joined with EOS and packed.
    generation: prompt, completion, EOS, the loss on the last two; a row too long loses the start of its
    prompt, then the end of its completion. With `is_encoder_decoder` the prompt goes to the encoder, the
    labels are the completion alone, and each loses its end. classification: one text or a pair, a class.

    Args:
        vocab_size: that of the model, to refuse token ids beyond it; the tokenizer's where not given.
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
        texts = load_prompts(sources, config, str(tokenizer.eos_token or ""))
        return generation_rows(*texts, tokenizer, config, is_encoder_decoder, vocab_size)
    if task == "classification":
        dataset = _classification_rows(sources, tokenizer, config)
        _check_token_ids(dataset.columns["input_ids"], vocab_size, "the tokenizer")
        return dataset
    raise ValueError(f"unknown task {task!r}: use one of {', '.join(get_args(Task))}")


def load_texts(sources: Source | Sequence[Source], text_column: str = "text") -> list[str]:
    """The documents of all sources, in order: a `.txt` file is one, each row of another source is one.

    Rows whose text is empty are skipped, counted and warned of; ValueError when none is left.
    """
    texts: list[str] = []
    for source in as_list(sources):
        if extension(source) == ".txt":
            texts.append(read_text(source))
            continue
        found = render(read_rows(source), text_column, source)
        kept = [text for text in found if text.strip()]
        _warn_skipped(len(found) - len(kept), len(found), f"{source}: rows with an empty {text_column!r}")
        texts += kept
    return texts


def load_prompts(
    sources: Source | Sequence[Source], config: DataConfig | None = None, eos_token: str | None = None
) -> tuple[list[str], list[str]]:
    """(prompts, completions) as texts, without `completion_end` or the tokenizer's `eos_token` at the end.

    Rows with an empty completion are skipped, counted and warned of; ValueError when none is left.
    """
    config = config or DataConfig()
    prompts: list[str] = []
    completions: list[str] = []
    for source in as_list(sources):
        rows = read_rows(source)
        prompts += render(rows, config.prompt, source)
        completions += render(rows, config.completion, source)
    for marker in filter(None, (config.completion_end, eos_token)):
        completions = [text.removesuffix(marker) for text in completions]
    kept = [i for i, text in enumerate(completions) if text.strip()]
    _warn_skipped(len(completions) - len(kept), len(completions), "rows with an empty completion")
    markers = Counter(m.group() for i in kept if (m := re.search(r"(<\|\w+\|>|</s>)$", completions[i])))
    for marker, count in markers.items():
        logger.warning("%d completions end with the text %r: completion_end removes it", count, marker)
    return [prompts[i] for i in kept], [completions[i] for i in kept]


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
            found = tokenise_documents(load_texts(source, config.text_column), tokenizer)
        _check_token_ids(found, vocab_size, source)
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
    _warn_cut(cut_prompts, total, "prompts", size)
    _warn_cut(cut_completions, total, "completions", size)
    _check_token_ids(input_ids, vocab_size, "the tokenizer")
    return PaddedRows({"input_ids": input_ids, "labels": labels}, _collator(tokenizer))


def _classification_rows(
    sources: Source | Sequence[Source], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> PaddedRows:
    names = [name.strip() for name in config.text_column.split(",")]
    if len(names) > 2:
        raise ValueError(f"text_column names {len(names)} columns: classification takes one or a pair, a,b")
    texts: list[tuple[str, ...]] = []  # (text,) or (text, second text) a row
    labels: list[str] = []
    for source in as_list(sources):
        rows = read_rows(source)
        found = list(zip(*(render(rows, name, source) for name in names), strict=True))
        values = [_label(value, source, i) for i, value in enumerate(column(rows, config.label_column, source), 1)]
        kept = [i for i, row in enumerate(found) if any(text.strip() for text in row)]
        _warn_skipped(len(found) - len(kept), len(found), f"{source}: rows with no text")
        texts += [found[i] for i in kept]
        labels += [values[i] for i in kept]
    class_names = config.class_names or _sorted_labels(labels)
    ids = {name: i for i, name in enumerate(class_names)}
    if unknown := sorted(set(labels) - set(ids)):
        raise ValueError(f"labels {', '.join(unknown)} are not among class_names, {', '.join(class_names)}")
    columns: dict[str, list[Any]] = {}
    cut = 0
    tokenise: Any = tokenizer  # its signature is wider than a checker can follow
    for start in range(0, len(texts), BATCH_ROWS):
        batch = tokenise(
            *(list(side) for side in zip(*texts[start : start + BATCH_ROWS], strict=True)),
            truncation=True,
            max_length=config.sequence_length,
            return_attention_mask=False,
        )
        cut += sum(bool(encoding.overflowing) for encoding in batch.encodings or ())
        for name, values in batch.items():
            columns.setdefault(name, []).extend(np.array(ids, dtype=np.int32) for ids in values)
    _warn_cut(cut, len(texts), "rows", config.sequence_length)
    return PaddedRows({**columns, "labels": [ids[label] for label in labels]}, _collator(tokenizer), tuple(class_names))


def _label(value: Any, source: Source, number: int) -> str:
    if value is None or not str(value).strip():
        raise ValueError(f"{source}: row {number} has no label: label it or remove it")
    return str(value).strip()


def _sorted_labels(labels: Sequence[str]) -> tuple[str, ...]:
    names = sorted(set(labels))
    if len(names) < 2:
        raise ValueError(f"the only label is {names[0]!r}: two are needed, or class_names for evaluation")
    numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
    return tuple(sorted(names, key=int) if numbers else names)


def _collator(tokenizer: PreTrainedTokenizerBase) -> PaddingCollator:
    pad: Any = tokenizer.pad_token_id
    return PaddingCollator(eos_id(tokenizer) if pad is None else pad)


def _check_token_ids(arrays: Sequence[np.ndarray], vocab_size: int, source: Source) -> None:
    highest = max((int(ids.max(initial=0)) for ids in arrays), default=0)
    if highest >= vocab_size:
        raise ValueError(
            f"{source}: token id {highest} is outside the vocabulary of {vocab_size}: "
            "tokenise with the tokenizer of the model"
        )


def _warn_skipped(count: int, total: int, what: str) -> None:
    """Log `count` of `total` skipped rows, if any; ValueError when they were all there was."""
    if count == total:
        raise ValueError(f"{what}: all {total}, nothing is left")
    if count:
        logger.warning("%s: skipped %d of %d", what, count, total)


def _warn_cut(count: int, total: int, what: str, size: int) -> None:
    if count:
        logger.warning("%d of %d %s cut to sequence_length=%d", count, total, what, size)
