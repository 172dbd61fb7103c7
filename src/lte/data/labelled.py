"""Rows of one text or a pair with a label: a class for classification, a number for regression."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lte.data.batches import PaddedRows
from lte.data.columns import cell, is_missing, text_of
from lte.data.config import DataConfig
from lte.data.rows import collator_for, warn_cut, warn_skipped
from lte.data.sources import Source, as_list
from lte.data.tokenise import BATCH_ROWS


def classification_rows(
    sources: Source | Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    labelled: bool,
    max_rows: int | None = None,
) -> PaddedRows:
    """Labels are the places of their names in `class_names`; in the rows they may be written as these places."""
    columns, labels = _texts_and_labels(sources, tokenizer, config, labelled, max_rows)
    class_names = config.class_names
    if labelled:
        class_names = class_names or _sorted_labels(labels)
        if len(class_names) < 2:
            raise ValueError(f"class_names needs two or more names, each once, not {class_names}")
        ids = {name: i for i, name in enumerate(class_names)}
        if not ids.keys() & set(labels):  # their places are as good
            ids = {str(i): i for i in range(len(class_names))}
        if unknown := sorted(set(labels) - set(ids)):
            where = ", ".join(map(str, as_list(sources)))
            raise ValueError(
                f"{where}: labels {', '.join(unknown)} are not among class_names, {', '.join(class_names)}"
            )
        columns["labels"] = [ids[label] for label in labels]
    return PaddedRows(columns, collator_for(tokenizer, config.pad_to_multiple_of), class_names)


def regression_rows(
    sources: Source | Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    labelled: bool,
    max_rows: int | None = None,
) -> PaddedRows:
    """Labels are numbers. `class_names` is the label's column alone: the model's head needs one output."""
    columns, labels = _texts_and_labels(sources, tokenizer, config, labelled, max_rows)
    if labelled:
        columns["labels"] = [_number(label, config.label_column) for label in labels]
    return PaddedRows(columns, collator_for(tokenizer, config.pad_to_multiple_of), (config.label_column,))


def _texts_and_labels(
    sources: Source | Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    labelled: bool,
    max_rows: int | None = None,
) -> tuple[dict[str, list[Any]], list[str]]:
    """What the tokenizer makes of the texts, by column, and the labels as they are written, if they are wanted."""
    names = [name.strip() for name in config.text_column.split(",")]
    if len(names) > 2:
        raise ValueError(f"text_column names {len(names)} columns: classification takes one or a pair, a,b")
    texts: list[tuple[str, ...]] = []  # (text,) or (text, second text) a row
    labels: list[str] = []
    for source in as_list(sources):
        cells, total, kept = [text_of(name, source) for name in names], 0, 0
        for total, row in enumerate(config.rows(source), 1):
            found = tuple(text(row, total) for text in cells)
            label = _label(cell(row, config.label_column, source, total), source, total) if labelled else ""
            if any(text.strip() for text in found):
                kept += 1
                texts.append(found)
                labels += [label] if labelled else []
            if len(texts) == max_rows:
                break
        warn_skipped(total - kept, total, f"{source}: rows with no text")
        if len(texts) == max_rows:
            break
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
    warn_cut(cut, len(texts), "rows", config.sequence_length)
    return columns, labels


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
        raise ValueError(f"the only label is {names[0]!r}: two are needed, or class_names for evaluation")
    numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
    return tuple(sorted(names, key=int) if numbers else names)
