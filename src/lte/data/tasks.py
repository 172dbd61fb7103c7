"""Makes a dataset for `transformers.Trainer` from sources: language modelling, generation, labelled texts."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from lte.data.batches import PackedBlocks, PaddedRows
from lte.data.columns import text_of
from lte.data.config import DataConfig
from lte.data.labelled import classification_rows, regression_rows
from lte.data.mapped_ids import MappedIds, rows_of
from lte.data.pairs import tokenised_pairs
from lte.data.prompts import prompt_pairs
from lte.data.rows import check_token_ids, collator_for, warn_skipped
from lte.data.sources import DataRow, Source, as_list, extension, read_rows, read_token_ids
from lte.data.stored import keep_rows, key_of
from lte.data.stored_columns import columns_of
from lte.data.text_files import read_pieces
from lte.data.tokenise import eos_id, tokenise_documents, wrapping

logger = logging.getLogger(__name__)

_ROWS = 16  # of ids, before they are written: 4 MB

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
    max_rows: int | None = None,
) -> PackedBlocks | PaddedRows:
    """Read `sources` (files or hub data sets) and tokenise them for `task`.

    language_modelling: documents are joined with EOS and packed into blocks. If the tokenizer has a BOS, each document
    and each block begins with it.
    generation: a row is prompt, completion and EOS, and the loss is on the last two. A row that is too long loses the
    start of its prompt, then the end of its completion. With `is_encoder_decoder` the prompt goes to the encoder, and
    the labels are the completion. Then both lose their ends.
    classification: one text or a pair of texts, and a class.
    regression: one text or a pair of texts, and a number.

    Args:
        vocab_size: that of the model; larger token ids are refused. The default is the tokenizer's.
        labelled: False reads rows of classification and regression without their labels. Thresholds need no labels.
        max_rows: only the first rows or blocks are read. Classes are then those of these rows.
    Returns: a dataset with `.collator`, and for classification `.class_names`. The model's head needs
        `num_labels=len(dataset.class_names)`.
    Raises: ValueError, FileNotFoundError or ImportError. One line says what is wrong and what to do.
    """
    config = config or DataConfig()
    vocab_size = vocab_size or max(tokenizer.get_vocab().values()) + 1  # len() does not count gaps in the ids
    if task == "language_modelling":
        if is_encoder_decoder:
            raise ValueError("an encoder-decoder model learns only the task generation: give prompt and completion")
        return _packed_blocks(sources, tokenizer, config, vocab_size, max_rows)
    if task == "generation":
        return _generation_rows(sources, tokenizer, config, is_encoder_decoder, vocab_size, max_rows)
    if task in ("classification", "regression"):
        rows = classification_rows if task == "classification" else regression_rows
        return rows(sources, tokenizer, config, vocab_size, labelled, max_rows)
    raise ValueError(f"unknown task {task!r}: use one of {', '.join(get_args(Task))}")


def load_texts(
    sources: Source | Sequence[Source],
    text_column: str = "text",
    rows: Callable[[Source], Iterable[DataRow]] = read_rows,
) -> list[str]:
    """Return the documents of all sources, in order: a `.txt` file is one, and so is each row of another source.

    Rows with an empty text are skipped, and a warning says how many. Raise ValueError if no row is left.
    """
    return ["".join(document) for source in as_list(sources) for document in _documents(source, text_column, rows)]


def _documents(
    source: Source, text_column: str, rows: Callable[[Source], Iterable[DataRow]]
) -> Iterator[Iterable[str]]:
    """Give each document of a source, as pieces of text. It is read when it is asked for."""
    if extension(source) == ".txt":
        yield read_pieces(source)
        return
    text, total, kept = text_of(text_column, source), 0, 0
    for total, row in enumerate(rows(source), 1):
        document = text(row, total)
        if document.strip():
            kept += 1
            yield (document,)
    warn_skipped(total - kept, total, f"{source}: rows with an empty {text_column!r}")


def _packed_blocks(
    sources: Source | Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    vocab_size: int,
    max_rows: int | None,
) -> PackedBlocks:
    listed, read = as_list(sources), (config.text_column, config.header, config.skip_bad_rows)
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)

    def stream() -> Iterator[np.ndarray]:
        pieces = (piece for source in listed for piece in _pieces_of(source, tokenizer, config, vocab_size))
        return (ids.astype(dtype) for ids in _joined(pieces, tokenizer, vocab_size))

    if len(listed) == 1 and extension(listed[0]) == ".npy":
        ids = read_token_ids(listed[0])  # stays memory-mapped
        check_token_ids(_sliced(ids), vocab_size, listed[0])
    elif key := key_of(listed, tokenizer, max_rows, "ids", vocab_size, read):
        ids = MappedIds(keep_rows(lambda: rows_of(stream(), dtype), key, rows_at_once=_ROWS))
    else:
        ids = _in_memory(stream(), dtype, None if max_rows is None else max_rows * config.sequence_length)
    eos: Any = tokenizer.eos_token_id
    dataset = PackedBlocks(ids, config.sequence_length, wrapping(tokenizer)[0], eos)
    left_out = len(ids) - len(dataset.ids)
    logger.info("%d blocks of %d tokens, the last %d tokens left out", len(dataset), config.sequence_length, left_out)
    return dataset if max_rows is None else dataset.head(max_rows)


def _pieces_of(
    source: Source, tokenizer: PreTrainedTokenizerBase, config: DataConfig, vocab_size: int
) -> Iterator[tuple[bool, np.ndarray]]:
    """Give the token ids of a source in pieces. A piece comes with True if a document starts there."""
    if extension(source) == ".npy":
        pieces = ((i == 0, ids) for i, ids in enumerate(_sliced(read_token_ids(source))))
    else:
        pieces = tokenise_documents(_documents(source, config.text_column, config.rows), tokenizer)
    for starts, ids in pieces:
        check_token_ids([ids], vocab_size, source)
        yield starts, ids


def _sliced(ids: np.ndarray, size: int = 1 << 20) -> Iterator[np.ndarray]:
    return (ids[start : start + size] for start in range(0, len(ids), size))


def _joined(
    pieces: Iterable[tuple[bool, np.ndarray]], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> Iterator[np.ndarray]:
    """Give one stream (tokens,) in pieces: the documents, with an EOS between two unless there is one."""
    last = None
    for starts, ids in pieces:
        if starts and last is not None:
            eos = eos_id(tokenizer)
            check_token_ids([np.array([eos])], vocab_size, "the tokenizer's EOS")
            if last != eos and ids[0] != eos:
                yield np.array([eos])
        yield ids
        last = ids[-1]


def _in_memory(stream: Iterable[np.ndarray], dtype: np.dtype, most: int | None) -> np.ndarray:
    """Return the ids (tokens,) of a stream. Reading stops when there are at least `most`."""
    ids = array(dtype.char)
    for piece in stream:
        ids.frombytes(piece.tobytes())
        if most is not None and len(ids) >= most:
            break
    return np.frombuffer(ids, dtype)


def _generation_rows(
    sources: Source | Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    is_encoder_decoder: bool,
    vocab_size: int,
    max_rows: int | None,
) -> PaddedRows:
    listed, read = as_list(sources), replace(config, pad_to_multiple_of=1)
    template = getattr(tokenizer, "chat_template", None)
    key = key_of(listed, tokenizer, max_rows, "generation", vocab_size, read, is_encoder_decoder, template)

    def rows() -> Iterator[dict[str, np.ndarray]]:
        pairs = prompt_pairs(listed, config, tokenizer, max_rows)
        return tokenised_pairs(pairs, tokenizer, config.sequence_length, is_encoder_decoder, vocab_size)

    return PaddedRows(columns_of(rows, key), collator_for(tokenizer, config.pad_to_multiple_of))


def generation_rows(
    prompts: Sequence[str],
    completions: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    is_encoder_decoder: bool,
    vocab_size: int,
) -> PaddedRows:
    """Return the dataset that `load_dataset_for` would make of these texts, for the task generation."""
    pairs = zip(prompts, completions, strict=True)
    rows = tokenised_pairs(pairs, tokenizer, config.sequence_length, is_encoder_decoder, vocab_size)
    return PaddedRows(columns_of(lambda: rows, None), collator_for(tokenizer, config.pad_to_multiple_of))
