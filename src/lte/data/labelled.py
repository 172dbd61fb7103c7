"""Rows of one text or a pair with a label: a class for classification, a number for regression."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lte.data.batches import PaddedRows
from lte.data.columns import cell, is_missing, text_of
from lte.data.config import DataConfig
from lte.data.rows import check_token_ids, collator_for, warn_cut, warn_skipped
from lte.data.sources import Source, as_list
from lte.data.stored import key_of
from lte.data.stored_columns import columns_of
from lte.data.tokenise import BATCH_ROWS

_LABEL = "label as it is written"  # a column that no tokenizer makes


def classification_rows(
    sources: Source | Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    vocab_size: int,
    labelled: bool,
    max_rows: int | None = None,
) -> PaddedRows:
    """Return the dataset of texts with classes. A label is an index in `class_names`; rows hold name or index."""
    columns, labels = _texts_and_labels(sources, tokenizer, config, vocab_size, labelled, max_rows)
    class_names = config.class_names
    if labelled:
        class_names = class_names or _sorted_labels(labels)
        if len(class_names) < 2:
            raise ValueError(f"class_names needs two or more names, each once, not {class_names}")
        ids = {name: i for i, name in enumerate(class_names)}
        if not ids.keys() & set(labels):  # indices are valid too
            ids = {str(i): i for i in range(len(class_names))}
        if unknown := sorted(set(labels) - set(ids)):
            where = ", ".join(map(str, as_list(sources)))
            raise ValueError(
                f"{where}: labels {', '.join(unknown)} are not in class_names, which are {', '.join(class_names)}"
            )
        columns["labels"] = [ids[label] for label in labels]
    return PaddedRows(columns, collator_for(tokenizer, config.pad_to_multiple_of), class_names)


def regression_rows(
    sources: Source | Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    vocab_size: int,
    labelled: bool,
    max_rows: int | None = None,
) -> PaddedRows:
    """Return the dataset of texts with numbers. `class_names` is the label's column: the head needs one output."""
    columns, labels = _texts_and_labels(sources, tokenizer, config, vocab_size, labelled, max_rows)
    if labelled:
        columns["labels"] = [_number(label, config.label_column) for label in labels]
    return PaddedRows(columns, collator_for(tokenizer, config.pad_to_multiple_of), (config.label_column,))


def _texts_and_labels(
    sources: Source | Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    vocab_size: int,
    labelled: bool,
    max_rows: int | None,
) -> tuple[dict[str, Sequence[Any]], list[str]]:
    """Return the tokenized texts, by column, and the labels as they are written (empty unless `labelled`)."""
    names = [name.strip() for name in config.text_column.split(",")]
    if len(names) > 2:
        raise ValueError(f"text_column names {len(names)} columns: classification takes one or a pair, a,b")
    listed = as_list(sources)

    def rows() -> Iterator[dict[str, Any]]:
        found = islice(_found(listed, names, config, labelled), max_rows)
        return _tokenised(found, tokenizer, config.sequence_length, vocab_size)

    read = replace(config, class_names=None, pad_to_multiple_of=1)
    columns = columns_of(rows, key_of(listed, tokenizer, max_rows, "labelled", read, vocab_size, labelled))
    labels = [label for label in columns.pop(_LABEL) if label is not None]
    return columns, labels


def _found(
    sources: Sequence[Source], names: Sequence[str], config: DataConfig, labelled: bool
) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """Give (text,) or (text, second text) of each row that has text, and the row's label."""
    for source in sources:
        cells, total, kept = [text_of(name, source) for name in names], 0, 0
        for total, row in enumerate(config.rows(source), 1):
            texts = tuple(text(row, total) for text in cells)
            label = _label(cell(row, config.label_column, source, total), source, total) if labelled else None
            if any(text.strip() for text in texts):
                kept += 1
                yield texts, label
        warn_skipped(total - kept, total, f"{source}: rows with no text")


def _tokenised(
    found: Iterator[tuple[tuple[str, ...], str | None]],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    vocab_size: int,
) -> Iterator[dict[str, Any]]:
    cut = total = 0
    tokenise: Any = tokenizer  # its signature is wider than a checker can follow
    while rows := list(islice(found, BATCH_ROWS)):
        texts, labels = zip(*rows, strict=True)
        batch = tokenise(
            *(list(side) for side in zip(*texts, strict=True)),
            truncation=True,
            max_length=sequence_length,
            return_attention_mask=False,
        )
        cut += sum(bool(encoding.overflowing) for encoding in batch.encodings or ())
        total += len(rows)
        for *values, label in zip(*batch.values(), labels, strict=True):
            row = {name: np.array(ids, dtype=np.int32) for name, ids in zip(batch, values, strict=True)}
            check_token_ids([row["input_ids"]], vocab_size, "the tokenizer")
            yield {**row, _LABEL: label}
    warn_cut(cut, total, "rows", sequence_length)


def _label(value: Any, source: Source, number: int) -> str:
    text = "" if is_missing(value) else str(value).strip()
    if not text:
        raise ValueError(f"{source}: row {number} has no label: label it or remove it")
    return text.split(".")[0] if re.fullmatch(r"-?\d+\.0+", text) else text  # pandas writes 1 as 1.0 beside a gap


def _number(label: str, name: str) -> float:
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"column {name!r} holds {label!r}: regression needs numbers; for names, task classification")
    return value


def _sorted_labels(labels: Sequence[str]) -> tuple[str, ...]:
    names = sorted(set(labels))
    if len(names) < 2:
        raise ValueError(f"the only label is {names[0]!r}: give data with two labels, or class_names for evaluation")
    numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
    return tuple(sorted(names, key=int) if numbers else names)
