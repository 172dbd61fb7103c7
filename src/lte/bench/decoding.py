"""Greedy decoding of one model with a clock: everything ``generate`` does for a token, and nothing else."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from lte.bench.timing import Run, capture, synchronize

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoded:
    """Token ids with the prompt ``[B, P + N]``, and seconds: of the prefill, of every later token."""

    tokens: Tensor
    prefill: float
    steps: list[float]

    @property
    def total(self) -> float:
        return self.prefill + sum(self.steps)


class Decoder:
    """A model that decodes prompts of one size, the prompt's pass eager as in ``generate``.

    On CUDA a step uses a static cache, is compiled if asked for, and is one CUDA graph, which is what
    ``generate(cache_implementation="static")`` has with ``torch.compile(mode="reduce-overhead", fullgraph=True)``.
    A tuned one is compiled with coordinate descent tuning, which at batch 1 also makes torch multiply matrices and
    vectors by kernels of its own instead of cuBLAS.
    On a CPU it is eager with a dynamic cache, as ``generate`` is, unless it is to be compiled. Each step ends
    with the wait for the GPU that ``generate`` needs to see whether all texts have ended.

    The graph reads the model's weights where they are: a change in place (of router biases) counts.
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
        self.how = "eager"
        self.device = model.device
        length = prompt_tokens + new_tokens
        self._room = -(-length // 8) * 8  # attention kernels want the mask aligned
        self._token = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self._position = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self._columns = torch.arange(self._room, device=self.device).view(1, 1, 1, -1)
        self._tokens = torch.zeros(batch, length, dtype=torch.long, device=self.device)
        self._unfinished = torch.ones(1, dtype=torch.bool, device=self.device)
        self._end = torch.full((1,), -1, device=self.device)  # no token: every text gets its full length
        self._cache: Any = None
        self._static = compile or self.device.type == "cuda"
        self._step: Run = self._static_runs(compile, tune) if self._static else self._eager_step

    @torch.no_grad()
    def __call__(self, prompt_BS: Tensor) -> Decoded:
        synchronize(self.device)
        began = time.perf_counter()
        self._prefill(prompt_BS)
        times = []
        while bool(self._unfinished):  # waits, as generate does
            times.append(time.perf_counter())
            if len(times) == self.new_tokens:
                break
            self._step()
        steps = [after - before for before, after in pairwise(times)]
        return Decoded(self._tokens.clone(), times[0] - began, steps)

    def _prefill(self, prompt_BS: Tensor) -> None:
        if not self._static:
            self._cache = DynamicCache(config=self.model.config)
        elif self._cache is None:
            self._cache = StaticCache(config=self.model.config, max_cache_len=self._room)
            if any(layer.is_sliding for layer in self._cache.layers):  # they count in Python, which a graph does not
                raise ValueError(f"{type(self.model).__name__} has a sliding window, which no static step is made for")
        else:
            self._cache.reset()
        self._tokens[:, : self.prompt_tokens] = prompt_BS
        self._position.fill_(self.prompt_tokens - 1)
        logits = self.model(input_ids=prompt_BS, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        self._take(logits)

    def _take(self, logits_BSV: Tensor) -> None:
        """Choose the next token, append it, see whether all texts have ended."""
        self._token.copy_(logits_BSV[:, -1].float().argmax(-1, keepdim=True))
        self._position.add_(1)
        self._tokens.index_copy_(1, self._position[0], self._token)
        self._unfinished.copy_((self._token != self._end).any())

    def _eager_step(self) -> None:
        self._take(self.model(input_ids=self._token, past_key_values=self._cache, use_cache=True).logits)

    @torch.no_grad()
    def _static_runs(self, compile: bool, tune: bool) -> Run:
        """The step with a static cache: compiled where that works, on CUDA as a graph."""
        graph = ", CUDA graph" if self.device.type == "cuda" else ""
        if compile:
            try:
                options: Any = {"coordinate_descent_tuning": True} if tune else None
                run = self._prepared(torch.compile(_static_step, fullgraph=True, dynamic=False, options=options))
            except Exception as error:  # of many kinds; without compiling it still runs
                logger.warning("the step was not compiled: %s", " ".join(str(error).split())[:300])
            else:
                self.how = f"compiled{' and tuned' if tune else ''}{graph}"
                return run
        self.how = f"static cache{graph}"
        return self._prepared(_static_step)

    def _prepared(self, step: Callable[..., Tensor]) -> Run:
        def run() -> None:
            self._take(step(self.model, self._token, self._position, self._columns, self._cache))

        self._prefill(self._tokens[:, : self.prompt_tokens].clone())  # makes the cache
        if self.device.type == "cuda":
            return capture(run)
        run()
        return run


def _static_step(model: Any, token_B1: Tensor, position: Tensor, columns: Tensor, cache: Any) -> Tensor:
    mask = (columns <= position).expand(token_B1.shape[0], 1, 1, columns.shape[-1])
    if model.config._attn_implementation == "eager":  # it adds the mask
        mask = torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
    return model(
        input_ids=token_B1, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
    ).logits
