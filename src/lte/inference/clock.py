"""The time at which each token came."""

import time

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """A streamer that keeps the time of each of its calls.

    Args:
        inner: another streamer, which gets all tokens too.

    Attributes:
        times: seconds on ``time.perf_counter``. The first is that of the prompts, then there is one for each step.
    """

    def __init__(self, inner: BaseStreamer | None = None) -> None:
        self.times: list[float] = []
        self._inner = inner

    def put(self, value: Tensor) -> None:
        """Keep the time and pass the tokens on."""
        self.times.append(time.perf_counter())
        if self._inner is not None:
            self._inner.put(value)

    def end(self) -> None:
        """Pass the end on."""
        if self._inner is not None:
            self._inner.end()
