"""Makes prompts and completions of rows: from columns, templates or chats."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain

from transformers import PreTrainedTokenizerBase

from lte.data.chat import ChatTemplate, chat_in, pair_to_chat, tools_in
from lte.data.columns import cell, text_of
from lte.data.config import DataConfig
from lte.data.rows import warn_skipped
from lte.data.sources import Source, as_list

logger = logging.getLogger(__name__)

_MARKER = re.compile(r"(<\|\w+\|>|</s>)$")


def load_prompts(
    sources: Source | Sequence[Source],
    config: DataConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_rows: int | None = None,
) -> tuple[list[str], list[str]]:
    """Return (prompts, completions) as texts, without `completion_end` or the tokenizer's EOS at the end.

    Chats need the tokenizer, for its template. Reading stops after `max_rows` rows.

    Rows with an empty completion are skipped, and a warning says how many. Raise ValueError if no row is left.
    """
    pairs = list(prompt_pairs(as_list(sources), config or DataConfig(), tokenizer, max_rows))
    return [prompt for prompt, _ in pairs], [completion for _, completion in pairs]


def prompt_pairs(
    sources: Sequence[Source], config: DataConfig, tokenizer: PreTrainedTokenizerBase | None, max_rows: int | None
) -> Iterator[tuple[str, str]]:
    """Give the same, pair by pair. Rows are read when they are asked for. Warnings of skipped rows come at the end."""
    endings = _Endings(config, tokenizer)
    total = kept = 0
    for pair in chain.from_iterable(_pairs(source, config, tokenizer, endings) for source in sources):
        total += 1
        if pair[1].strip():
            kept += 1
            yield pair
            if kept == max_rows:
                break
    warn_skipped(total - kept, total, "rows with an empty completion")
    endings.warn()


def _pairs(
    source: Source, config: DataConfig, tokenizer: PreTrainedTokenizerBase | None, endings: _Endings
) -> Iterator[tuple[str, str]]:
    if config.messages is not None:
        yield from _answers(source, config, ChatTemplate(tokenizer), endings)
        return
    template = ChatTemplate(tokenizer) if config.chat else None
    prompt, completion = text_of(config.prompt, source), text_of(config.completion, source)
    marked = endings.removed
    for number, row in enumerate(config.rows(source), 1):
        pair = prompt(row, number), endings.remove(completion(row, number))
        if template is None or not pair[1].strip():  # a template would make a text of an empty row
            yield pair
            continue
        try:
            ((before, answer),) = template.answers(pair_to_chat(*pair))
        except ValueError as error:
            raise ValueError(f"{source}: row {number}: {error}") from error
        yield before, endings.without_eos(answer)
    if config.completion_end and endings.removed == marked:
        logger.warning("%s: no completion ends with completion_end (%r)", source, config.completion_end)


def _answers(
    source: Source, config: DataConfig, template: ChatTemplate, endings: _Endings
) -> Iterator[tuple[str, str]]:
    """Give the answers in chats. Chats without an answer, or bad ones if `skip_bad_rows`, are skipped."""
    name = config.messages or ""
    number = silent = bad = 0
    first: ValueError | None = None
    for number, row in enumerate(config.rows(source), 1):
        value = cell(row, name, source, number)
        try:
            found = template.answers(chat_in(value, name, endings.remove), tools_in(row.get("tools")))
        except ValueError as error:
            first = first or ValueError(f"{source}: row {number}: {error}")
            if not config.skip_bad_rows:
                raise first from error
            bad += 1
            continue
        silent += not found
        yield from ((prompt, endings.without_eos(answer)) for prompt, answer in found)
    if first and bad == number:
        raise first
    if silent + bad == number:
        raise ValueError(f"none of {number} chats has an answer of the assistant, so there is nothing to learn")
    if bad:
        logger.warning("%s: skipped %d of %d chats, the first for this: %s", source, bad, number, first)
    if silent:
        logger.warning("%d of %d chats have no answer of the assistant: skipped", silent, number)


class _Endings:
    """The ends of completions. `completion_end` and EOS are removed, and other end markers are counted.

    The model would learn an end marker of another model as text.
    """

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase | None):
        self._end, self._tokenizer = config.completion_end, tokenizer
        self._eos = None if tokenizer is None else str(tokenizer.eos_token or "")
        self._alien: Counter[str] = Counter()
        self.removed = 0

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(() if self._tokenizer is None else self._tokenizer.get_vocab())

    def remove(self, completion: str) -> str:
        """Return the completion without `completion_end` and EOS at its end."""
        if self._end and completion.endswith(self._end):
            self.removed += 1
            completion = completion.removesuffix(self._end)
        completion = self.without_eos(completion)
        if (marker := _MARKER.search(completion)) and marker.group() not in self._known:
            self._alien[marker.group()] += 1
        return completion

    def without_eos(self, completion: str) -> str:
        return completion.removesuffix(self._eos) if self._eos else completion

    def warn(self) -> None:
        for marker, count in self._alien.items():
            logger.warning(
                "%d completions end with the text %r, which is no token of this tokenizer: completion_end removes it",
                count,
                marker,
            )
