"""``lte.generate`` with a clock: the function that users call, greedy, and the time of each token."""

import logging
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lte.bench.timing import synchronize
from lte.inference.clock import Clock
from lte.inference.cpu_step import covers
from lte.inference.generate import generate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoded:
    """Token ids with the prompt ``[B, P + N]``, the seconds until the first new token, and those of each later one."""

    tokens: Tensor
    prefill: float
    steps: list[float]

    @property
    def total(self) -> float:
        return self.prefill + sum(self.steps)


class TimedDecoder:
    """A model that continues prompts of one size by :func:`lte.generate`.

    Args:
        model: on its device.
        batch, prompt_tokens, new_tokens: the size.
        compile, tune: as for :func:`lte.generate`. A step that does not compile is timed without, with a warning.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        prompt_tokens: int,
        new_tokens: int,
        compile: bool,
        tune: bool = False,
    ):
        self.model, self.batch = model, batch
        self.prompt_tokens, self.new_tokens = prompt_tokens, new_tokens
        self.device = model.device
        self._compile, self._tune = compile, tune
        prompt = torch.zeros(batch, prompt_tokens, dtype=torch.long, device=self.device)
        try:
            self(prompt)
        except ValueError as error:
            if not compile:
                raise
            logger.warning("%s", error)
            self._compile = False
            self(prompt)

    @property
    def how(self) -> str:
        """The way in which a step runs, in words."""
        cuda = self.device.type == "cuda"
        compiled = f"compiled{' and tuned' if self._tune and cuda else ''}"
        plain = "one call" if self.device.type == "cpu" and covers(self.model) else "eager"
        return ", ".join(filter(None, [compiled if self._compile else "", "CUDA graph" if cuda else ""])) or plain

    def __call__(self, prompt_BS: Tensor) -> Decoded:
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        clock = Clock()
        synchronize(self.device)
        began = time.perf_counter()
        tokens = generate(
            self.model,
            {"input_ids": prompt_BS, "attention_mask": torch.ones_like(prompt_BS)},
            compile=self._compile,
            tune=self._tune,
            max_new_tokens=self.new_tokens,
            streamer=clock,
            **options,
        )
        _prompt, *times = clock.times
        return Decoded(tokens, times[0] - began, [after - before for before, after in pairwise(times)])
