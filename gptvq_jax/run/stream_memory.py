"""Streams in memory: what StreamFiles does, for as little text as needs no file."""

import contextlib
from collections.abc import Iterator

import numpy as np

from gptvq_jax.run.activations import BFLOAT16


class StreamMemory:
    """Holds streams, arrays (n, T, width), while it lives; see StreamFiles for what is asked."""

    def __init__(self):
        self._arrays: dict[tuple[str, int], np.ndarray] = {}

    def read(self, stream: str, point: int) -> np.ndarray:
        return self._arrays[stream, point]

    @contextlib.contextmanager
    def write(
        self, stream: str, point: int, shape: tuple[int, ...], dtype: np.dtype = BFLOAT16
    ) -> Iterator[np.ndarray]:
        out = np.empty(shape, dtype)
        yield out
        self._arrays[stream, point] = out

    def points(self, stream: str) -> list[int]:
        return sorted(point for name, point in self._arrays if name == stream)

    def drop(self, stream: str, keep: range = range(0)) -> None:
        for point in self.points(stream):
            if point not in keep:
                del self._arrays[stream, point]

    def drop_behind(self, stream: str, point: int, step: int) -> None:
        for other in self.points(stream):
            if (other - point) * step < 0:
                del self._arrays[stream, other]
