"""When each token came."""

import time

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """A streamer that notes when it got what.

    Args:
        inner: gets everything as well.

    Attributes:
        times: seconds on ``time.perf_counter``: of the prompts first, then of each step's tokens.
    """

    def __init__(self, inner: BaseStreamer | None = None) -> None:
        self.times: list[float] = []
        self._inner = inner

    def put(self, value: Tensor) -> None:
        """Note the time, and pass the tokens on."""
        self.times.append(time.perf_counter())
        if self._inner is not None:
            self._inner.put(value)

    def end(self) -> None:
        """Pass the end on."""
        if self._inner is not None:
            self._inner.end()
