"""Ends of texts that the host finds, in their words. A token that ends a text is found on the device."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StopStringCriteria

from lte.inference.decoder import Streamer


class Until(StoppingCriteria):
    """Ends a text when it holds one of some strings. Prompts do not count, unlike in Hugging Face's ``stop_strings``.

    Args:
        strings: the strings. Empty ones end nothing.
        tokenizer: the model's.
        prompt_tokens: length of the prompts, including padding.
    """

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt_tokens: int) -> None:
        self._strings = [one for one in strings if one]
        self._decode: Any = tokenizer.decode
        self._prompt_tokens = prompt_tokens
        self._last = max((len(one.encode()) for one in self._strings), default=0) + 1  # a token has a byte or more

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Return which rows of ``[B, P + N]`` have ended, ``[B]``."""
        last_BN = input_ids[:, self._prompt_tokens :][:, -self._last :]
        return torch.tensor([self._holds(row) for row in last_BN.tolist()], device=input_ids.device)

    def cut(self, new_N: Tensor) -> Tensor:
        """Return a text's tokens up to the one that completes a string; all of them if the text holds none."""
        ids = new_N.tolist()
        return new_N[: bisect_left(range(len(ids)), True, key=lambda n: self._holds(ids[: n + 1])) + 1]

    def _holds(self, ids: list[int]) -> bool:
        text = self._decode(ids)
        return any(one in text for one in self._strings)


OF_TEXTS = (Until, StopStringCriteria)
"""Criteria that look only at tokens, so the host can ask them while the device computes the next step."""


class Ends:
    """A streamer that asks criteria after each step which texts have ended. It passes the tokens on.

    Args:
        criteria: some of :data:`OF_TEXTS`.
        prompts_BP: prompts, padded on the left.
        most: the highest number of new tokens.
        stops: the tokens that end a text.
        inner: another streamer, or None.
    """

    def __init__(
        self,
        criteria: Sequence[Callable[..., Tensor]],
        prompts_BP: Tensor,
        most: int,
        stops: Sequence[int],
        inner: Streamer | None,
    ) -> None:
        self._criteria, self._stops, self._inner = criteria, torch.tensor(stops, dtype=torch.long), inner
        self._count = prompts_BP.shape[1]
        self._ids_BT = F.pad(prompts_BP.cpu(), (0, most))
        self._ends_B = torch.full((len(prompts_BP),), self._ids_BT.shape[1])

    def put(self, value: Tensor) -> None:
        """Take the tokens ``[B]`` of a step."""
        if self.all_ended():
            return
        self._ids_BT[:, self._count] = value
        self._count += 1
        ended_B = torch.isin(value, self._stops)
        for one in self._criteria:
            ended_B = ended_B | one(self._ids_BT[:, : self._count], None)
        self._ends_B = torch.where(ended_B, self._ends_B.clamp(max=self._count), self._ends_B)
        if self._inner is not None:
            self._inner.put(value)

    def end(self) -> None:
        """Do nothing: the caller ends the inner streamer."""

    def all_ended(self) -> bool:
        """Return whether all texts have ended."""
        return bool((self._ends_B <= self._count).all())

    def cut(self, made_BT: Tensor, padding: int) -> Tensor:
        """Return prompts and texts with ``padding`` after the end of each text."""
        made_BT = made_BT[:, : int(self._ends_B.max())]
        place_T = torch.arange(made_BT.shape[1], device=made_BT.device)
        return made_BT.where(place_T < self._ends_B[:, None].to(made_BT.device), padding)
