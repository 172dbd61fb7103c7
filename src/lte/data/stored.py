"""Rows that take long to make are made once and kept on disk: in Arrow files, in the cache of `datasets`.

`datasets` locks an entry of its cache while it writes it, and it gives the entry its name when it is complete. So an
incomplete entry is never read. If several processes want an entry, one writes it and the others wait.
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
"""Bytes of sources. With fewer bytes, rows stay in memory, which is faster."""
_UNPACKED = 3  # bytes of text for a byte of a .gz file, about
_FORMAT = 1  # of the format on disk: a new number makes old entries unused


def is_large(sources: Sequence[Source]) -> bool:
    """Return whether rows of these sources are kept on disk. Those of a hub data set always are."""
    size = 0
    for source in sources:
        if extension(source) is None:
            return True
        size += os.path.getsize(source) * (_UNPACKED if os.fspath(source).lower().endswith(".gz") else 1)
    return size >= LARGE


def key_of(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, max_rows: int | None, *options: Any
) -> str | None:
    """Return the name under which the rows are kept on disk, or None if they stay in memory.

    Another file, tokenizer or option gives another name. With `max_rows` the rows stay in memory.
    """
    if max_rows is not None or not is_large(sources):
        return None
    versions = _FORMAT, transformers.__version__, tokenizers.__version__
    return digest([repr((versions, [*map(_state_of, sources)], _content_of(tokenizer), options)).encode()])


def keep_rows(make: Callable[[], Iterable[dict[str, Any]]], key: str, rows_at_once: int) -> list[str]:
    """Return the Arrow files of the rows that `make` gives. `make` is called only if there are none under this key.

    Args:
        make: gives at least one row. Rows are dicts of numpy arrays, numbers and texts, with the same names.
        rows_at_once: number of rows that are held in memory before they are written.

    Raises:
        NotWritten: a full disk, missing permissions and the like.
        ValueError: the files on disk are damaged. Errors of `make` are raised unchanged.
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
    """Switch the progress bar of `datasets` off if stderr is no terminal."""
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
    """Return values that change with the content of a source: size and times of a file, so that it need not be read."""
    if extension(source) is None:
        return source, hub_data(os.fspath(source))._fingerprint
    state = os.stat(source)
    return os.path.realpath(source), state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _content_of(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    """Return all state of a tokenizer that its ids depend on, without its last settings for truncation and padding."""
    from datasets.fingerprint import Hasher

    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = Hasher.hash(tokenizer) if backend is None else json.loads(backend.to_str())
    if isinstance(content, dict):
        content |= {"truncation": None, "padding": None}
    options = type(tokenizer).__qualname__, getattr(tokenizer, "split_special_tokens", None)
    return *options, tokenizer.special_tokens_map, content
