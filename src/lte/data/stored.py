"""What takes long to make is made once, and kept on disk: rows in Arrow files, in the cache of `datasets`.

`datasets` locks an entry of its cache while it is written, and gives the entry its name when it is whole. So nothing
half written is ever read, and of several processes one writes and the others wait.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from lte.data.digest import digest
from lte.data.sources import Source, extension, first_line, hub_data
from lte.files import writing

LARGE = 1 << 26
"""Bytes of sources: what is made of fewer stays in memory, which is faster than to keep it on disk."""
_UNPACKED = 3  # bytes that a byte of a .gz file stands for, about
_FORMAT = 1  # of what is kept: with another number, entries of before are not read


def is_large(sources: Sequence[Source]) -> bool:
    """Return whether what is made of these sources is to be kept on disk. A hub data set always is: it lies there."""
    size = 0
    for source in sources:
        if extension(source) is None:
            return True
        size += os.path.getsize(source) * (_UNPACKED if os.fspath(source).lower().endswith(".gz") else 1)
    return size >= LARGE


def key_of(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, max_rows: int | None, *options: Any
) -> str | None:
    """Return the name under which what is made of these is kept on disk, or None where it is to stay in memory.

    Another file, tokenizer or option gives another name. The first `max_rows` rows alone stay in memory.
    """
    if max_rows is not None or not is_large(sources):
        return None
    versions = _FORMAT, transformers.__version__, tokenizers.__version__
    return digest([repr((versions, [*map(_state_of, sources)], _content_of(tokenizer), options)).encode()])


def kept(make: Callable[[], Iterable[dict[str, Any]]], key: str, rows_at_once: int) -> list[str]:
    """Return the Arrow files of the rows that `make` gives; `make` is called where none are kept under this key.

    Args:
        make: gives one row or more, dicts of numpy arrays, numbers and texts, all with the same names.
        rows_at_once: how many rows are in memory until they are written.

    Raises:
        NotWritten: a full disk, missing permissions and the like.
        ValueError: what is kept is damaged. What `make` raises is raised as it is.
    """
    from datasets import Dataset, config
    from datasets.exceptions import DatasetGenerationError

    failed: list[Exception] = []

    def rows() -> Iterator[dict[str, Any]]:
        try:
            yield from make()
        except Exception as error:
            failed.append(error)
            raise

    cache = config.HF_DATASETS_CACHE
    try:
        with writing(f"the cache {cache} (HF_DATASETS_CACHE names another one)"), _bar_on_terminals():
            try:
                made = Dataset.from_generator(rows, fingerprint=key, writer_batch_size=rows_at_once)
            except DatasetGenerationError as error:
                raise error.__cause__ or error from None
    except Exception as error:
        if failed:
            raise failed[0] from None
        if isinstance(error, OSError):
            raise
        entry = os.path.join(cache, "generator", f"default-fingerprint={key}")
        raise ValueError(f"{entry}: damaged ({first_line(error)}): remove this folder") from error
    return [one["filename"] for one in made.cache_files]


@contextmanager
def _bar_on_terminals() -> Iterator[None]:
    """Leave out the progress bar of `datasets` where stderr is no terminal."""
    from datasets import utils

    shown = utils.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        utils.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bar()


def _state_of(source: Source) -> tuple[Any, ...]:
    """What changes with the content of a source: of a file its size and times, which is not to read all of it."""
    if extension(source) is None:
        return source, hub_data(os.fspath(source))._fingerprint
    state = os.stat(source)
    return os.path.realpath(source), state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _content_of(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    """All of a tokenizer that its ids depend on; how it cut and padded last is no part of it."""
    from datasets.fingerprint import Hasher

    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = Hasher.hash(tokenizer) if backend is None else json.loads(backend.to_str())
    if isinstance(content, dict):
        content |= {"truncation": None, "padding": None}
    options = type(tokenizer).__qualname__, getattr(tokenizer, "split_special_tokens", None)
    return *options, tokenizer.special_tokens_map, content
