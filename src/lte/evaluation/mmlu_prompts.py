"""MMLU's prompts as tokens: how many examples have room, the common start of prompts, and the answers' tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lte.data.tokenise import encode, wrapping
from lte.evaluation.mmlu_questions import LETTERS, Subject


@dataclass
class PromptGroup:
    """Prompts of a subject with a common start.

    Attributes:
        prefix: the token ids ``[T]`` of the common start; may be empty.
        rows: the other token ids of each prompt, at least one; longest first.
        places: the indices of their questions in the subject.
        shots: number of examples.
        cut: whether the prompts were too long even without examples.
    """

    subject: str
    prefix: Tensor
    rows: list[Tensor]
    places: list[int]
    shots: int
    cut: bool


class PromptEncoder:
    """Prompts as token ids, up to the token that differs between the answers.

    ``answers`` are the four tokens to compare. If " A" is one token, they are " A" to " D". If it is several tokens,
    the common ones belong to the prompt, and the first ones that differ are compared.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, room: int):
        self._tokenizer = tokenizer
        self._room = room
        self._start = wrapping(tokenizer)[0]
        several = list(encode([f"Answer: {letter}" for letter in LETTERS], tokenizer))
        common = _common(several)
        self.answers = [ids[common] for ids in several if len(ids) > common]
        if len(set(self.answers)) < len(LETTERS):
            raise ValueError(
                'the tokenizer does not tell " A", " B", " C" and " D" apart by one token after "Answer:", '
                "so that no next token is the answer"
            )
        self._tail = several[0][common:]

    def groups(self, subject: Subject, shots: int) -> list[PromptGroup]:
        """Return the prompts of a subject, in groups with the same number of examples.

        Raises:
            ValueError: ``shots`` is below 0 or above the number of examples, or an answer's tokens depend on the
                prompt.
        """
        if not 0 <= shots <= len(subject.examples):
            raise ValueError(f"shots is {shots}, but {subject.name} has {len(subject.examples)} examples")
        found, waiting = [], list(range(len(subject.questions)))
        for fewer in range(shots, -1, -1):
            prompts = [subject.prompt(subject.questions[place], fewer) for place in waiting]
            encoded = dict(zip(waiting, self._encode(prompts), strict=True))
            fitting = {place: ids for place, ids in encoded.items() if len(ids) <= self._room}
            found.append(_group(subject.name, fitting, fewer))
            waiting = [place for place in waiting if place not in fitting]
            if not fewer:
                cut = {place: self._start + encoded[place][len(self._start) - self._room :] for place in waiting}
                found.append(_group(subject.name, cut, fewer, cut=True))
        return [group for group in found if group.rows]

    def _encode(self, prompts: list[str]) -> list[list[int]]:
        tail = self._tail
        several = list(encode([f"{prompt} {LETTERS[0]}" for prompt in prompts], self._tokenizer))
        if any(ids[-len(tail) :] != tail for ids in several):
            raise ValueError('the tokenizer has other tokens for " A" in a longer text: its answers cannot be compared')
        return [self._start + ids[: -len(tail)] for ids in several]


def _group(subject: str, prompts: Mapping[int, list[int]], shots: int, cut: bool = False) -> PromptGroup:
    """Return the group of these prompts. The prefix is found in tokens: a cut of the text can change tokens."""
    places = sorted(prompts, key=lambda place: -len(prompts[place]))
    rows = [prompts[place] for place in places]
    common = min(_common(rows), len(rows[-1]) - 1) if len(rows) > 1 else 0
    prefix = rows[0][:common] if rows else []
    return PromptGroup(
        subject, torch.tensor(prefix, dtype=torch.long), [torch.tensor(r[common:]) for r in rows], places, shots, cut
    )


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Return the number of first tokens that all rows have in common."""
    alike = (len(set(tokens)) == 1 for tokens in zip(*rows, strict=False))
    return next((i for i, same in enumerate(alike) if not same), min(map(len, rows)))
