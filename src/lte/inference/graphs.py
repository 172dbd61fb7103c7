"""CUDA graphs: capturing a call, and replaying a layer's when it is called eager, one launch in place of many."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Action = Callable[[], object]
"""A call without arguments, to be captured or timed. Its result is not used."""

_MOST_TOKENS = 64
_FROM = 3
"""Times that a number of tokens has to come before it is captured: a prompt's length comes once."""
_MOST = 4
"""Numbers of tokens that a layer keeps a graph of."""


class Unshared:
    """Belongs to one object in one process: a copy of it, or what is read back from a pickle, is new and empty."""

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()


def capture(run: Action, pool: Any = None) -> Action:
    """``run`` as a CUDA graph: the call that replays it. It must not wait for the GPU.

    Args:
        run: what to capture; it is called three times before.
        pool: memory that other graphs use as well, which never run at the same time.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the first calls compile, choose kernels and allocate workspaces
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph.replay


@dataclass(frozen=True)
class _Kept:
    key: object
    x: Tensor
    y: list[Tensor]
    replay: Action


class Replays(Unshared):
    """A layer's graphs by the number of its tokens.

    In eager decoding the host is what takes time: checks, three launches by Triton. A graph is one launch. It reads
    its input from a place of its own and writes the output to another, so both are copied.
    """

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._kept: dict[int, _Kept] = {}
        self._lock = threading.Lock()

    def __call__(self, x: Tensor, key: object, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """``compute(x)``, by replaying it where that is possible.

        Args:
            x: ``[..., D]`` on a GPU.
            key: all that ``compute`` depends on beside ``x``; when it changes, or the stream, the graph is made anew.
            compute: gives a tensor of the shape of ``x``. It must not wait for the GPU.
        """
        tokens = x.numel() // x.shape[-1]
        if tokens > _MOST_TOKENS or torch.cuda.is_current_stream_capturing():
            return compute(x)
        with self._lock, torch.cuda.device_of(x):
            key = torch.cuda.current_stream().cuda_stream, key
            kept = self._kept.get(tokens)
            if kept is None or kept.key != key:
                self._seen[tokens] = self._seen.get(tokens, 0) + 1
                if self._seen[tokens] < _FROM or (kept is None and len(self._kept) == _MOST):
                    return compute(x)
                kept = self._kept[tokens] = _captured(x, key, compute)
            kept.x.copy_(x.view_as(kept.x))
            kept.replay()
            return kept.y[0].clone().view(x.shape)


def _captured(x: Tensor, key: object, compute: Callable[[Tensor], Tensor]) -> _Kept:
    with torch.inference_mode(False):
        place = torch.empty(x.numel() // x.shape[-1], x.shape[-1], dtype=x.dtype, device=x.device)
    place.copy_(x.view_as(place))
    y: list[Tensor] = []

    def run() -> None:
        y[:] = [compute(place)]

    return _Kept(key, place, y, capture(run))
