"""Streams: what goes from block to block, arrays (n, T, width) at the points between two blocks.

Point 7 is where block 6 ends and block 7 begins.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from gptvq_jax.run.activations import BFLOAT16


class StreamStore(ABC):
    """Holds streams, each under its name."""

    @abstractmethod
    def read(self, stream: str, point: int) -> Any:
        """What slices to arrays of windows."""

    @abstractmethod
    def write(
        self, stream: str, point: int, shape: tuple[int, ...], dtype: np.dtype = BFLOAT16
    ) -> AbstractContextManager[Any]:
        """A context that gives what slices of windows are assigned to; it is there at its end."""

    @abstractmethod
    def points(self, stream: str) -> list[int]:
        """Where the stream is there, rising."""

    @abstractmethod
    def remove(self, stream: str, point: int) -> None:
        """Forgets the stream at a point."""

    def drop(self, stream: str, keep: range = range(0)) -> None:
        """Forgets a stream, but for some points."""
        for point in self.points(stream):
            if point not in keep:
                self.remove(stream, point)

    def drop_behind(self, stream: str, point: int, step: int) -> None:
        """Forgets what a walk in the direction of `step` has behind it at a point."""
        for other in self.points(stream):
            if (other - point) * step < 0:
                self.remove(stream, other)
