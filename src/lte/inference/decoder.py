"""The decoding loop: a step is one call, on CUDA one compiled graph, and nothing in it waits for the host."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lte.inference.attention import attending, mask_form
from lte.inference.graphs import Action, capture
from lte.inference.sampling import NotCovered, Sampler, Tokens
from lte.inference.slot_cache import Masks, SlotCache, check_filled, mask_kinds, step_masks

logger = logging.getLogger(__name__)

Preparing = Callable[[str], AbstractContextManager[object]]

_TUNED: dict[str, Any] = {"coordinate_descent_tuning": True}
"""Options of inductor on CUDA: at batch 1 torch then multiplies matrices and vectors by kernels of its own."""
_LATE = 1
"""Steps that the host is behind the GPU when it looks whether all texts have ended."""


class Streamer(Protocol):
    """What ``generate`` calls a streamer."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True)
class Prompts:
    """Prompts of a batch after their pass through the model.

    Attributes:
        ids, mask: ``[B, P]``, padded on the left.
        logits: ``[B, V]``, of each prompt's last token.
        cache: their keys and values.
    """

    ids: Tensor
    mask: Tensor
    logits: Tensor
    cache: DynamicCache

    @classmethod
    def read(cls, model: PreTrainedModel, ids_BP: Tensor, mask_BP: Tensor | None) -> "Prompts":
        """Pass prompts through the model, eager: each length is another shape."""
        call: Any = model
        cache = DynamicCache(config=model.config)
        mask = torch.ones_like(ids_BP) if mask_BP is None else mask_BP
        made = call(
            input_ids=ids_BP,
            attention_mask=mask_BP,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        check_filled(made.past_key_values)
        return cls(ids_BP, mask, made.logits[:, -1], cache)


@dataclass(frozen=True)
class How:
    """How a step runs.

    Attributes:
        compile: through ``torch.compile``.
        tune: where it is compiled, with a search for the fastest kernels.
        graph: as a CUDA graph.
    """

    compile: bool = False
    tune: bool = False
    graph: bool = False


class Decoder:
    """The step of one model for up to ``batch`` texts of up to ``slots`` tokens, kept for the next call.

    Args:
        model: causal, on one device.
        prompts: the first to be continued.
        batch, slots: sizes of the buffers.
    """

    def __init__(self, model: PreTrainedModel, prompts: Prompts, batch: int, slots: int, how: How) -> None:
        self.batch, self.slots, self.how = batch, slots, how
        self._slot_B = torch.zeros(batch, dtype=torch.long, device=model.device)
        self._cache = SlotCache(prompts.cache, batch, slots, self._slot_B)
        self._kinds = mask_kinds(model.config)
        self._form = mask_form(model, how.graph)
        self._step: Callable[..., Tensor] = self._eager_step
        if how.compile:
            tuned = _TUNED if how.tune else None
            self._step = torch.compile(self._eager_step, fullgraph=True, dynamic=False, options=tuned)
        self._ways: dict[tuple[object, ...], tuple[Tokens, Action]] = {}

    def prepare(self, model: PreTrainedModel, sampler: Sampler, preparing: Preparing) -> None:
        """Compile and capture the step for a way of choosing tokens, unless that is done.

        Raises:
            NotCovered: the step cannot be captured.
        """
        if sampler.key in self._ways:
            return
        tokens = Tokens(self.batch, self.slots, model.config.get_text_config().vocab_size, sampler, model.device)

        def run() -> None:
            masks = step_masks(self._kinds, self._slot_B, self.slots, self._form)  # once, not in each layer
            with attending(model, self._form):
                logits_BV = self._step(model, tokens.last_B, self._slot_B, masks)
            tokens.append(sampler.choose(logits_BV, tokens))
            self._slot_B.add_(1)

        if not (self.how.compile or self.how.graph):
            self._ways[sampler.key] = tokens, run
            return
        what = f"{'compiling' if self.how.compile and not self._ways else 'capturing'} the decoding step"
        with preparing(f"{what}: batch {self.batch}, {self.slots} tokens"), _own_random(model.device), _many_sizes():
            self._slot_B.zero_()
            run()  # compiles
            self._ways[sampler.key] = tokens, self._captured(run) if self.how.graph else run

    def decode(
        self,
        prompts: Prompts,
        sampler: Sampler,
        padding: int,
        most: int,
        streamer: Streamer | None = None,
        out_of_time: Callable[[], bool] = lambda: False,
    ) -> Tensor:
        """Continue prompts until all have ended.

        Args:
            prompts: at most :attr:`batch`, of which each has room for ``most`` more tokens in :attr:`slots`.
            sampler: prepared.
            padding: the token that follows a text's end.
            most: new tokens of each text, at least 1.
            streamer: gets each step's tokens ``[B]``.
            out_of_time: asked after each step; True ends all texts.

        Returns:
            ``[B, P + N]``: prompts and new tokens.
        """
        tokens, run = self._ways[sampler.key]
        rows, length = prompts.ids.shape
        self._cache.fill(prompts.cache, length - prompts.mask.sum(-1))
        self._slot_B.zero_()
        self._slot_B[:rows] = prompts.mask.sum(-1)
        tokens.begin(prompts.ids, prompts.mask, padding)
        logits = torch.nn.functional.pad(prompts.logits, (0, 0, 0, self.batch - rows))
        tokens.append(sampler.choose(logits, tokens))
        watch = _Watch(tokens, rows, streamer)
        made = 1
        while not watch.ended(made == most or out_of_time()):
            run()
            made += 1
        return torch.cat([prompts.ids, tokens.made_BN[:rows, : watch.read]], dim=-1)

    def _captured(self, run: Action) -> Action:
        try:
            return capture(run)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # it waits for the GPU, or copies from the host
            raise NotCovered(f"its step cannot be captured ({' '.join(str(error).split())[:120]})") from error

    def _eager_step(self, model: Any, token_B: Tensor, slot_B: Tensor, masks: Masks) -> Tensor:
        return model(
            input_ids=token_B[:, None],
            attention_mask=masks,
            position_ids=slot_B[:, None],
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]


class _Watch:
    """The host's view of the tokens: on CUDA one step late, so that the GPU has its next step before it is asked.

    Attributes:
        read: steps that the host has seen; the tokens of later ones count for nothing.
    """

    def __init__(self, tokens: Tokens, rows: int, streamer: Streamer | None) -> None:
        self._tokens, self._rows, self._streamer = tokens, rows, streamer
        self._cuda = tokens.last_B.is_cuda
        self._seen: deque[tuple[Tensor, Tensor, Any]] = deque()
        self._free = [self._room() for _ in range(_LATE + 1)]
        self.read = 0

    def ended(self, last: bool) -> bool:
        """Look at the step just begun. True if no other has to follow: all texts have ended, or it was the ``last``."""
        ended, ids, event = self._free.pop()
        ended.copy_(self._tokens.finished_B.all(), non_blocking=True)
        if self._streamer is not None:
            ids.copy_(self._tokens.last_B, non_blocking=True)
        if event is not None:
            event.record()
        self._seen.append((ended, ids, event))
        while len(self._seen) > (0 if last or not self._cuda else _LATE):
            if self._read():
                return True
        return last

    def _read(self) -> bool:
        ended, ids, event = self._seen.popleft()
        if event is not None:
            event.synchronize()
        self.read += 1
        if self._streamer is not None:
            self._streamer.put(ids[: self._rows].clone())
        self._free.append((ended, ids, event))
        return bool(ended)

    def _room(self) -> tuple[Tensor, Tensor, Any]:
        ended = torch.zeros((), dtype=torch.bool, pin_memory=self._cuda)
        ids = torch.zeros(len(self._tokens.last_B), dtype=torch.long, pin_memory=self._cuda)
        return ended, ids, torch.cuda.Event() if self._cuda else None


def _own_random(device: torch.device) -> AbstractContextManager[object]:
    """Within it, steps draw from a random state of their own."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _many_sizes() -> AbstractContextManager[object]:
    """Within it, each model and size may be compiled by itself: torch stops at eight programs of one function."""
    return torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096)  # pyright: ignore


def timer(criteria: Sequence[Any]) -> Callable[[], bool]:
    """Whether the time of a ``MaxTimeCriteria`` is over."""
    ends = [one.initial_timestamp + one.max_time for one in criteria]
    return lambda: any(time.time() > end for end in ends)
