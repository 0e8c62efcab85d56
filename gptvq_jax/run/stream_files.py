"""Streams on disk: what goes from block to block, one file for every point between two blocks.

00007.float.npy holds the stream "float" at point 7, the entrance of block 7 and the exit of block
6.
"""

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from gptvq_jax.run.activations import BFLOAT16, Activations, Writer, writing


class StreamFiles:
    """Reads and writes the streams of a directory, arrays (n, T, width)."""

    def __init__(self, directory: Path):
        self.directory = directory

    def path(self, stream: str, point: int) -> Path:
        return self.directory / f"{point:05d}.{stream}.npy"

    def read(self, stream: str, point: int) -> Activations:
        """Raises FileNotFoundError where it is missing, ValueError where it is damaged."""
        return Activations(self.path(stream, point))

    def write(
        self, stream: str, point: int, shape: tuple[int, ...], dtype: np.dtype = BFLOAT16
    ) -> AbstractContextManager[Writer]:
        """A context whose Writer fills the file, which is there once the context ends."""
        return writing(self.path(stream, point), shape, dtype)

    def pass_on(
        self, stream: str, point: int, shape: tuple[int, ...], dtype: np.dtype = BFLOAT16
    ) -> AbstractContextManager[Writer]:
        """The same for what a killed run needs not: nobody waits until the disk has it."""
        return contextlib.closing(Writer(self.path(stream, point), shape, dtype))

    def points(self, stream: str) -> list[int]:
        """Where there is such a file, rising."""
        found = self.directory.glob(f"*.{stream}.npy")
        return sorted(int(path.name.partition(".")[0]) for path in found)

    def drop(self, stream: str, keep: range = range(0)) -> None:
        """Removes the files of a stream, but for some points."""
        for point in self.points(stream):
            if point not in keep:
                self.path(stream, point).unlink()

    def drop_behind(self, stream: str, point: int, step: int) -> None:
        """Removes what a walk in the direction of `step` has behind it at a point."""
        for other in self.points(stream):
            if (other - point) * step < 0:
                self.path(stream, other).unlink()
