"""The decoding loop. A step is one call, on CUDA one compiled graph, and no part of it waits for the host."""

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
from lte.inference.cpu_step import one_call
from lte.inference.graphs import Action, capture
from lte.inference.sampling import NotCovered, Sampler, Tokens
from lte.inference.slot_cache import Masks, SlotCache, check_filled, mask_kinds, step_masks

logger = logging.getLogger(__name__)

Preparing = Callable[[str], AbstractContextManager[object]]

_TUNED: dict[str, Any] = {"coordinate_descent_tuning": True}
"""Options of inductor on CUDA. With them, torch has its own kernels for a matrix times a vector, at batch 1."""
_LATE = 1
"""The number of steps by which the host is behind the GPU when it checks whether all texts have ended."""


class Streamer(Protocol):
    """The methods that ``generate`` calls on a streamer."""

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
        """Pass prompts through the model, eager, because each length is another shape."""
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
        compile: whether it is compiled by ``torch.compile``.
        tune: whether compiling includes a search for the fastest kernels.
        graph: whether it is a CUDA graph.
        one_call: whether it is one call of our own kernels for CPUs, if they cover the model.
    """

    compile: bool = False
    tune: bool = False
    graph: bool = False
    one_call: bool = False


class Decoder:
    """The step of one model for up to ``batch`` texts of up to ``slots`` tokens, kept for the next call.

    Args:
        model: causal, on one device.
        prompts: the first prompts to continue; their cache gives the shapes.
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
        self._own = self._one_call(model) if how.one_call else None
        self._seen, self._together = slots, False
        self._ways: dict[tuple[object, ...], tuple[Tokens, Action]] = {}

    def prepare(self, model: PreTrainedModel, sampler: Sampler, preparing: Preparing) -> None:
        """Compile and capture the step for one way to choose tokens, unless this was done before.

        Raises:
            NotCovered: the step cannot be captured.
        """
        if sampler.key in self._ways:
            return
        tokens = Tokens(self.batch, self.slots, model.config.get_text_config().vocab_size, sampler, model.device)

        def run() -> None:
            tokens.append(sampler.choose(self._logits(model, tokens.last_B), tokens))
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
        """Continue prompts until all texts have ended.

        Args:
            prompts: at most :attr:`batch` prompts. Each has room for ``most`` more tokens in :attr:`slots`.
            sampler: one that :meth:`prepare` was called with.
            padding: the token that fills a row after the end of its text.
            most: the highest number of new tokens of a text, at least 1.
            streamer: gets the tokens of each step, ``[B]``.
            out_of_time: called after each step. If it returns True, all texts end.

        Returns:
            ``[B, P + N]``: prompts and new tokens.
        """
        tokens, run = self._ways[sampler.key]
        rows, length = prompts.ids.shape
        self._cache.fill(prompts.cache, length - prompts.mask.sum(-1))
        self._slot_B.zero_()
        length_B = prompts.mask.sum(-1)
        self._slot_B[:rows] = length_B
        tokens.begin(prompts.ids, prompts.mask, padding)
        logits = torch.nn.functional.pad(prompts.logits, (0, 0, 0, self.batch - rows))
        tokens.append(sampler.choose(logits, tokens))
        watch = _Watch(tokens, rows, streamer)
        made, longest, together = 1, int(length_B.max()), bool((length_B == length_B[0]).all())
        while not watch.ended(made == most or out_of_time()):
            if not (self.how.compile or self.how.graph or self._own):
                self._show(longest + made, together)
            run()
            made += 1
        return torch.cat([prompts.ids, tokens.made_BN[:rows, : watch.read]], dim=-1)

    def _show(self, seen: int, together: bool) -> None:
        """Show the next step, which is eager, only the slots that it needs."""
        self._seen, self._together = seen, together
        self._cache.show(seen, together)

    def _one_call(self, model: PreTrainedModel) -> Callable[[Tensor], Tensor] | None:
        try:
            return one_call(model, self._cache, self._slot_B)
        except NotCovered as error:
            logger.info("a step of %s is eager: %s", type(model).__name__, error)
            return None

    def _captured(self, run: Action) -> Action:
        try:
            return capture(run)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # it waits for the GPU, or copies from the host
            raise NotCovered(f"its step cannot be captured ({' '.join(str(error).split())[:120]})") from error

    def _logits(self, model: PreTrainedModel, token_B: Tensor) -> Tensor:
        if self._own is not None:
            return self._own(token_B)
        # once, not in each layer
        masks = step_masks(self._kinds, self._slot_B, self._seen, self._form, self._together)
        with attending(model, self._form):
            return self._step(model, token_B, self._slot_B, masks)

    def _eager_step(self, model: Any, token_B: Tensor, slot_B: Tensor, masks: Masks | None) -> Tensor:
        return model(
            input_ids=token_B[:, None],
            attention_mask=masks,
            position_ids=slot_B[:, None],
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]


class _Watch:
    """The tokens as the host sees them. On CUDA this is one step late, so that the GPU never waits for its next step.

    Attributes:
        read: the number of steps that the host has seen. Tokens of later steps are not used.
    """

    def __init__(self, tokens: Tokens, rows: int, streamer: Streamer | None) -> None:
        self._tokens, self._rows, self._streamer = tokens, rows, streamer
        self._cuda = tokens.last_B.is_cuda
        self._seen: deque[tuple[Tensor, Tensor, Any]] = deque()
        self._free = [self._room() for _ in range(_LATE + 1)]
        self.read = 0

    def ended(self, last: bool) -> bool:
        """Return whether decoding is over after this step: all texts have ended, or it is the ``last`` step."""
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
    """Return a context in which steps draw from another random state."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _many_sizes() -> AbstractContextManager[object]:
    """Return a context in which each model and size can be compiled. By default torch stops at eight programs."""
    return torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096)  # pyright: ignore


def timer(criteria: Sequence[Any]) -> Callable[[], bool]:
    """Return a function that says whether the time of a ``MaxTimeCriteria`` is over."""
    ends = [one.initial_timestamp + one.max_time for one in criteria]
    return lambda: any(time.time() > end for end in ends)
