"""From sources to a dataset for `transformers.Trainer`: language modelling, generation, labelled texts."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from lte.data.batches import IGNORED, PackedBlocks, PaddedRows
from lte.data.columns import text_of
from lte.data.config import DataConfig
from lte.data.labelled import classification_rows, regression_rows
from lte.data.prompts import load_prompts
from lte.data.rows import check_token_ids, collator_for, warn_cut, warn_skipped
from lte.data.sources import Row, Source, as_list, extension, read_rows, read_token_ids
from lte.data.text_files import read_pieces
from lte.data.tokenise import encode, eos_id, tokenise_documents, without_start, wrapping

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
    max_rows: int | None = None,
) -> PackedBlocks | PaddedRows:
    """Read `sources` (files or hub data sets) and tokenise them for `task`.

    language_modelling: documents, each with the tokenizer's BOS if it has one, joined with EOS and packed into blocks,
    each of which begins with BOS too.
    generation: prompt, completion, EOS, the loss on the last two; a row too long loses the start of its
    prompt, then the end of its completion. With `is_encoder_decoder` the prompt goes to the encoder, the
    labels are the completion alone, and each loses its end. classification: one text or a pair, a class.
    regression: the same with a number.

    Args:
        vocab_size: that of the model, to refuse token ids beyond it; the tokenizer's where not given.
        labelled: False for classification and regression rows that need no label, and then have none: those that
            thresholds are set on.
        max_rows: only the first rows or blocks; what follows is not read. Classes are then those of these rows.
    Returns: a dataset with `.collator`, and for classification `.class_names`: the model's head needs
        `num_labels=len(dataset.class_names)`.
    Raises: ValueError, FileNotFoundError or ImportError, in one line that says what is wrong and the fix.
    """
    config = config or DataConfig()
    vocab_size = vocab_size or max(tokenizer.get_vocab().values()) + 1  # len() would not count gaps in the ids
    if task == "language_modelling":
        if is_encoder_decoder:
            raise ValueError("an encoder-decoder model learns generation: give prompt and completion")
        return _packed_blocks(sources, tokenizer, config, vocab_size, max_rows)
    if task == "generation":
        texts = load_prompts(sources, config, tokenizer, max_rows)
        return generation_rows(*texts, tokenizer, config, is_encoder_decoder, vocab_size)
    if task in ("classification", "regression"):
        rows = classification_rows if task == "classification" else regression_rows
        dataset = rows(sources, tokenizer, config, labelled, max_rows)
        check_token_ids(dataset.columns["input_ids"], vocab_size, "the tokenizer")
        return dataset
    raise ValueError(f"unknown task {task!r}: use one of {', '.join(get_args(Task))}")


def load_texts(
    sources: Source | Sequence[Source],
    text_column: str = "text",
    rows: Callable[[Source], Iterable[Row]] = read_rows,
) -> list[str]:
    """The documents of all sources, in order: a `.txt` file is one, each of the `rows` of another source is one.

    Rows whose text is empty are skipped, counted and warned of; ValueError when none is left.
    """
    return ["".join(document) for source in as_list(sources) for document in _documents(source, text_column, rows)]


def _documents(source: Source, text_column: str, rows: Callable[[Source], Iterable[Row]]) -> Iterator[Iterable[str]]:
    """Each document of a source as texts to put together, read when it is asked for."""
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
    listed = as_list(sources)
    if len(listed) == 1 and extension(listed[0]) == ".npy":
        ids = read_token_ids(listed[0])  # stays memory-mapped
        check_token_ids(_sliced(ids), vocab_size, listed[0])
    else:
        pieces = (piece for source in listed for piece in _pieces_of(source, tokenizer, config, vocab_size))
        most = None if max_rows is None else max_rows * config.sequence_length
        ids = _joined(pieces, tokenizer, vocab_size, most)
    eos: Any = tokenizer.eos_token_id
    dataset = PackedBlocks(ids, config.sequence_length, wrapping(tokenizer)[0], eos)
    left_out = len(ids) - len(dataset.ids)
    logger.info("%d blocks of %d tokens, the last %d tokens left out", len(dataset), config.sequence_length, left_out)
    return dataset if max_rows is None else dataset.head(max_rows)


def _pieces_of(
    source: Source, tokenizer: PreTrainedTokenizerBase, config: DataConfig, vocab_size: int
) -> Iterator[tuple[bool, np.ndarray]]:
    """The token ids of a source, piece by piece, each with whether a document starts there."""
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
    pieces: Iterable[tuple[bool, np.ndarray]], tokenizer: PreTrainedTokenizerBase, vocab_size: int, most: int | None
) -> np.ndarray:
    """One stream (tokens,) of documents with EOS between two, unless it is there: uint16 where ids fit, or uint32.

    No piece is asked for once there are `most` tokens.
    """
    code, dtype = ("H", np.uint16) if vocab_size <= 2**16 else ("I", np.uint32)
    joined = array(code)
    for starts, ids in pieces:
        if starts and joined:
            eos = eos_id(tokenizer)
            check_token_ids([np.array([eos])], vocab_size, "the tokenizer's EOS")
            if joined[-1] != eos and ids[0] != eos:
                joined.append(eos)
        joined.frombytes(ids.astype(dtype).tobytes())
        if most is not None and len(joined) >= most:
            break
    return np.frombuffer(joined, dtype)


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
    for written, completion in encoded:
        prompt = without_start(written, start)
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
