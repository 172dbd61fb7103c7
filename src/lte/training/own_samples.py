"""Text that a model writes itself, as data for its training: chats, or texts of a model without a chat template.

The model writes the user's turn after the template's header, then the answer (Magpie, Xu et al., 2024, section 2).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from lte.data.chat import ChatTemplate, pair_to_chat
from lte.data.tokenise import encode, eos_id, most_tokens, without_start, wrapping
from lte.evaluation.generation import COMPILED_FROM, PLAIN
from lte.inference.completions import complete, padded, stop_ids
from lte.inference.ends import Until
from lte.training.batch_log import Batch, BatchLog

_PLACE = "the text of a message"
_DEFAULT = 1000
_BARREN = 10  # batches without a new row, after which there is no hope
_GRAM, _REPEATED = 8, 0.2
"""A text repeats itself if more than this share of its runs of 8 tokens is not new (Rae et al., 2021, section A1.1)."""


@dataclass(frozen=True)
class SampleOptions:
    """How a model writes text."""

    num_samples: int | None = None
    """The number of chats or texts to keep. The default is 1000, or one for each prompt of --prompts."""
    max_prompt_tokens: int = 256
    """The most tokens of a user's turn."""
    max_new_tokens: int = 512
    """The most tokens of an answer, or of a text. A longer answer is dropped, a longer text is cut."""
    temperature: float = 1.0
    """Of sampling. With 1 and top_p 1, text is as likely as the model says."""
    top_p: float = 0.95
    """Sample from the most likely tokens that together have this probability."""
    batch_size: int = 32
    """Texts that are written together."""
    chat: bool | None = None
    """Write chats, or texts after BOS. The default is chats if the tokenizer has a chat template."""
    seed: int = 0
    """Of sampling. The same seed, batch size and device give the same rows."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_prompt_tokens", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give at least 1")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature {self.temperature}, top_p {self.top_p}: give above 0, and top_p up to 1")


@dataclass(frozen=True)
class _Written:
    text: str
    ended: bool
    fault: str


class Writer:
    """Lets a model write batches of chats or texts. Each batch has a seed of its own, so it does not depend on others.

    Args:
        model: causal, on its device. Decoding is fastest after :func:`lte.optimize_`.
        tokenizer: the model's.
        options: how it writes.
        prompts: what users ask, or the starts of texts; empty if the model writes them too.

    Raises:
        ValueError: the texts have no room in the model's positions, or chats are asked for without a template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: SampleOptions,
        prompts: Sequence[str] = (),
    ) -> None:
        self._model, self._tokenizer, self._options, self._prompts = model, tokenizer, options, prompts
        chat = bool(tokenizer.chat_template) if options.chat is None else options.chat
        self._template = ChatTemplate(tokenizer) if chat else None
        self._start = wrapping(tokenizer)[0]
        self._stops = stop_ids(model, tokenizer)
        self._pad = self._stops[0] if self._stops else 0
        self._special = [one.content for one in tokenizer.added_tokens_decoder.values() if one.special]
        self._header, self._footer = "", ""
        if self._template is not None:
            user = self._template.render([{"role": "user", "content": _PLACE}])
            self._header, _, self._footer = user.partition(_PLACE)
        own = len(self._ids(self._header)) + (0 if self._template is None else options.max_prompt_tokens)
        given = (len(self._ids(self._asked(one))) for one in prompts)
        longest = max(given, default=own) + options.max_new_tokens
        if longest > (room := most_tokens(tokenizer, model.config)):
            raise ValueError(f"texts of {longest} tokens are beyond the model's {room} positions: ask for fewer tokens")
        steps = -(-wanted(options, len(prompts)) // options.batch_size) * options.max_new_tokens
        self._compile = None if steps >= COMPILED_FROM else False

    def write(self, number: int) -> Batch:
        """Return batch ``number``. With prompts it is of the prompts ``number * batch_size`` and later."""
        size = self._options.batch_size
        prompts = self._prompts[number * size : (number + 1) * size]
        return self._texts(prompts, number) if self._template is None else self._chats(prompts, number)

    def _texts(self, starts: Sequence[str], number: int) -> Batch:
        starts = starts or [""] * self._options.batch_size
        written, tokens = self._continue(starts, self._options.max_new_tokens, 2 * number)
        pairs = zip(starts, written, strict=True)
        rows = [{"text": start + one.text} for start, one in pairs if not one.fault]
        return Batch(rows, dict(Counter(one.fault for one in written if one.fault)), tokens)

    def _chats(self, prompts: Sequence[str], number: int) -> Batch:
        dropped, tokens = Counter[str](), 0
        if not prompts:
            size, most = self._options.batch_size, self._options.max_prompt_tokens
            written, tokens = self._continue([self._header] * size, most, 2 * number, self._footer.strip())
            dropped.update(f"prompt {fault}" for one in written if (fault := _fault(one)))
            prompts = [one.text for one in written if not _fault(one)]
        if not prompts:
            return Batch([], dict(dropped), tokens)
        asked = [self._asked(one) for one in prompts]
        answers, more = self._continue(asked, self._options.max_new_tokens, 2 * number + 1)
        dropped.update(f"answer {fault}" for one in answers if (fault := _fault(one)))
        pairs = zip(prompts, answers, strict=True)
        rows = [{"messages": pair_to_chat(prompt, one.text)} for prompt, one in pairs if not _fault(one)]
        return Batch(rows, dict(dropped), tokens + more)

    def _asked(self, prompt: str) -> str:
        """Return the text before an answer: the template's, or the prompt itself."""
        if self._template is None:
            return prompt
        return self._template.render(pair_to_chat(prompt, "")[:1], add_generation_prompt=True)

    def _ids(self, text: str) -> list[int]:
        (ids,) = encode([text], self._tokenizer)
        ids = self._start + without_start(ids, self._start)
        return ids or [eos_id(self._tokenizer)]  # without BOS, a text begins after the end of another

    @torch.no_grad()
    def _continue(self, starts: Sequence[str], most: int, stream: int, end: str = "") -> tuple[list[_Written], int]:
        """Return the texts after ``starts``, without ``end`` and what follows it, and the number of tokens."""
        inputs = padded([torch.tensor(self._ids(start)) for start in starts], "left", self._pad)
        until = Until([end], self._tokenizer, inputs["input_ids"].shape[1])
        done = complete(
            self._model,
            inputs,
            self._stops,
            seed=(self._options.seed << 32) + stream,
            compile=self._compile,
            max_new_tokens=most,
            stopping_criteria=StoppingCriteriaList([until]),
            pad_token_id=self._pad,
            do_sample=True,
            temperature=self._options.temperature,
            top_p=self._options.top_p,
            top_k=0,
            **PLAIN,
        )
        new = [until.cut(one.new).tolist() for one in done]
        return [self._written(ids, end) for ids in new], sum(map(len, new))

    def _written(self, ids: list[int], end: str) -> _Written:
        decode: Any = self._tokenizer.decode  # of one row a text, which a checker does not know
        stopped = ids[-1] in self._stops
        text, found, _ = decode(ids[:-1] if stopped else ids).partition(end or "\0")
        fault = ""
        if not text.strip():
            fault = "empty"
        elif any(one in text for one in self._special):
            fault = "with special tokens"
        elif repeats(ids):
            fault = "repetitive"
        return _Written(text.strip() if self._template else text, stopped or bool(found), fault)


def _fault(turn: _Written) -> str:
    return turn.fault or ("" if turn.ended else "too long")


def repeats(ids: Sequence[int]) -> bool:
    """Return whether more than a fifth of a text's runs of 8 tokens occurred in it before."""
    runs = [tuple(ids[first : first + _GRAM]) for first in range(len(ids) - _GRAM + 1)]
    return bool(runs) and 1 - len(set(runs)) / len(runs) > _REPEATED


def wanted(options: SampleOptions, num_prompts: int) -> int:
    """Return how many rows to keep."""
    return options.num_samples or num_prompts or _DEFAULT


def own_samples(
    writer: Writer, log: BatchLog, most: int, numbers: Iterable[int], progress: Callable[[int], None]
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Return up to ``most`` rows that differ from each other, and the numbers of dropped texts by reason.

    Args:
        log: the batches that were written before. New ones are added.
        numbers: of the batches, in order; those in the log are not written again.
        progress: called with the number of rows that a batch has added.

    Raises:
        ValueError: ten batches together add no row.
    """
    rows, dropped, seen, barren = list[dict[str, Any]](), Counter[str](), set[str](), 0
    for place, number in enumerate(numbers):
        if len(rows) >= most:
            break
        if place < len(log.batches):
            batch = log.batches[place]
        else:
            log.add(batch := writer.write(number))
        new = {key: row for row in batch.rows if (key := _key(row)) not in seen}
        dropped.update(batch.dropped)
        dropped["twice"] += len(batch.rows) - len(new)
        seen |= new.keys()
        rows += new.values()
        progress(min(len(new), most - len(rows) + len(new)))
        barren = 0 if new else barren + 1
        if barren == _BARREN:
            why = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common() if count)
            raise ValueError(f"the last {barren} batches gave no usable text ({why}): try another temperature or top_p")
    return rows[:most], +dropped


def _key(row: dict[str, Any]) -> str:
    """Return what must differ between rows: the user's turn or the text, without case and white space."""
    text = row["messages"][0]["content"] if "messages" in row else row["text"]
    return " ".join(text.lower().split())
