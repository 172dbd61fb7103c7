"""CUDA graphs: capture a call, and replay the graph of a layer in eager mode, one launch instead of many."""

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
"""How often a number of tokens has to come before it is captured. The length of a prompt comes only once."""
_MOST = 4
"""A layer keeps graphs for at most this many numbers of tokens."""


class Unshared:
    """Base of an object that belongs to one other object in one process. Its copy is new and empty."""

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()


def capture(run: Action) -> Action:
    """Capture ``run`` as a CUDA graph and return the call that replays it.

    Args:
        run: the call to capture. It is called three times before, and it must not wait for the GPU.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the first calls compile, choose kernels and allocate workspaces
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@dataclass(frozen=True)
class _Kept:
    key: object
    x: Tensor
    y: list[Tensor]
    replay: Action


class Replays(Unshared):
    """The graphs of one layer, by the number of tokens.

    In eager decoding the host is slower than the GPU: it checks, and it launches three Triton kernels. A graph is one
    launch. It has fixed tensors for its input and its output, so both are copied.
    """

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._kept: dict[int, _Kept] = {}
        self._lock = threading.Lock()

    def __call__(self, x: Tensor, key: object, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``compute(x)``, by a replay if that is possible.

        Args:
            x: ``[..., D]`` on a GPU.
            key: all that ``compute`` depends on besides ``x``. If it or the stream changes, the graph is made again.
            compute: returns a tensor of the shape of ``x``. It must not wait for the GPU.
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
