"""Streams in memory, for as little text as needs no file."""

import contextlib
from collections.abc import Iterator

import numpy as np

from gptvq_jax.run.activations import BFLOAT16
from gptvq_jax.run.stream_store import StreamStore


class StreamMemory(StreamStore):
    """Streams that are there while it lives."""

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

    def remove(self, stream: str, point: int) -> None:
        del self._arrays[stream, point]
