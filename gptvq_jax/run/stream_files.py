"""Streams on disk: 00007.float.npy holds the stream "float" at point 7."""

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from gptvq_jax.files import durable, sharing
from gptvq_jax.run.activations import BFLOAT16, Activations, Writer, writing
from gptvq_jax.run.stream_store import StreamStore


class StreamFiles(StreamStore):
    """The streams of a directory, one file for every point."""

    def __init__(self, directory: Path):
        self.directory = directory

    @classmethod
    def opened(cls, directory: Path) -> "StreamFiles":
        """Of a directory that is made if it is missing, without what a killed process was writing.

        Nobody else may write there meanwhile.
        """
        sharing.by_writer(lambda: durable.make_directory(directory))
        durable.drop_partial(directory)
        return cls(directory)

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
        found = self.directory.glob(f"*.{stream}.npy")
        return sorted(int(path.name.partition(".")[0]) for path in found)

    def remove(self, stream: str, point: int) -> None:
        sharing.by_writer(self.path(stream, point).unlink)

    def drop(self, stream: str, keep: range = range(0)) -> None:
        sharing.by_writer(lambda: super(StreamFiles, self).drop(stream, keep))

    def drop_behind(self, stream: str, point: int, step: int) -> None:
        sharing.by_writer(lambda: super(StreamFiles, self).drop_behind(stream, point, step))
