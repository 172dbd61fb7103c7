"""The choice of the next token inside the decoding step. Settings are tensors, and the host reads nothing."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    LogitNormalization,
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

_OF_SCORES_ALONE = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    LogitNormalization,
)
"""These processors read no tokens and do not wait for the GPU, so they run inside a CUDA graph."""


class NotCovered(Exception):
    """The decoding loop cannot do what is asked for, so ``model.generate`` has to do it."""


class Sampler:
    """Turns logits into the next token by the processors of one call of ``generate``, in the same order.

    Args:
        processors: as ``generate`` prepares them.
        sample: whether a token is drawn by its probability. Otherwise the most likely token is taken.
        stops: ids of the tokens that end a text.
        prompt_tokens: length of the prompts, including padding.

    Raises:
        NotCovered: a processor needs the host, or is not one of Hugging Face's.
    """

    def __init__(self, processors: Sequence[LogitsProcessor], sample: bool, stops: Sequence[int], prompt_tokens: int):
        self.sample, self.stops = sample, tuple(stops)
        self.penalty = 1.0
        self.fewest = 0
        self._order: list[Callable[[Tensor, Tokens], Tensor]] = []
        said: list[object] = [sample, self.stops]
        for one in processors:
            if type(one) in _OF_SCORES_ALONE:
                self._order.append(lambda scores, _tokens, one=one: one(None, scores))  # pyright: ignore
                said.append((type(one).__name__, tuple(sorted(vars(one).items()))))
            elif type(one) is RepetitionPenaltyLogitsProcessor and not isinstance(one.prompt_ignore_length, int):
                self.penalty = one.penalty
                self._order.append(self._penalise)
                said.append(("penalty", one.penalty))
            elif type(one) is MinLengthLogitsProcessor:
                self._at_least(one.min_length - prompt_tokens, said)
            elif type(one) is MinNewTokensLengthLogitsProcessor:
                self._at_least(one.min_new_tokens, said)
            else:
                raise NotCovered(f"{type(one).__name__} looks at more than scores")
        self.key = tuple(said)
        """Samplers with the same key choose in the same way."""

    def _at_least(self, new: int, said: list[object]) -> None:
        self.fewest = max(self.fewest, new)
        self._order.append(self._go_on)
        said.append(("fewest", self.fewest))

    def choose(self, logits_BV: Tensor, tokens: "Tokens") -> Tensor:
        """Return the next token of each row, ``[B]`` int64."""
        scores_BV = logits_BV.float()
        for process in self._order:
            scores_BV = process(scores_BV, tokens)
        if self.sample:
            return torch.multinomial(scores_BV.softmax(-1), 1)[:, 0]
        return scores_BV.argmax(-1)

    def _penalise(self, scores_BV: Tensor, tokens: "Tokens") -> Tensor:
        penalised_BV = torch.where(scores_BV < 0, scores_BV * self.penalty, scores_BV / self.penalty)
        return torch.where(tokens.seen_BV, penalised_BV, scores_BV)

    def _go_on(self, scores_BV: Tensor, tokens: "Tokens") -> Tensor:
        early = tokens.count < self.fewest
        return scores_BV.masked_fill(early & tokens.ends_V, -torch.inf)


class Tokens:
    """The generated tokens, on the device, where a CUDA graph reads and writes them.

    Attributes:
        last_B: ``[B]`` int64, each row's last token.
        made_BN: ``[B, N]`` int64, the new tokens.
        count: ``[]`` int64, the number of new tokens of a row.
        finished_B: rows whose text has ended. All their later tokens are padding.
        seen_BV: tokens that occur in prompt or text. Empty unless there is a repetition penalty.
        ends_V: the tokens that end a text.
    """

    def __init__(self, batch: int, most: int, vocabulary: int, sampler: Sampler, device: torch.device) -> None:
        self.last_B = torch.zeros(batch, dtype=torch.long, device=device)
        self.made_BN = torch.zeros(batch, most, dtype=torch.long, device=device)
        self.count = torch.zeros((), dtype=torch.long, device=device)
        self.finished_B = torch.zeros(batch, dtype=torch.bool, device=device)
        self.padding = torch.zeros((), dtype=torch.long, device=device)
        self.seen_BV = torch.zeros(
            (batch, vocabulary) if sampler.penalty != 1 else (0, 0), dtype=torch.bool, device=device
        )
        self.ends_V = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        if sampler.stops:
            self.ends_V[[stop for stop in sampler.stops if stop < vocabulary]] = True

    def begin(self, prompt_BP: Tensor, mask_BP: Tensor, padding: int) -> None:
        """Start again with these prompts. Rows without a prompt count as ended."""
        rows = len(prompt_BP)
        self.made_BN.fill_(padding)
        self.padding.fill_(padding)
        self.count.zero_()
        self.finished_B.zero_()
        self.finished_B[rows:] = True
        if self.seen_BV.numel():
            self.seen_BV.zero_()
            self.seen_BV[:rows].scatter_(1, torch.where(mask_BP.bool(), prompt_BP, prompt_BP[:, -1:]), True)

    def append(self, chosen_B: Tensor) -> None:
        """Append one token to each row, and padding to rows that have ended."""
        self.last_B.copy_(torch.where(self.finished_B, self.padding, chosen_B))
        self.made_BN.index_copy_(1, self.count[None], self.last_B[:, None])
        self.count.add_(1)
        self.finished_B.logical_or_(self.ends_V[self.last_B])
        if self.seen_BV.numel():
            self.seen_BV.scatter_(1, self.last_B[:, None], True)
