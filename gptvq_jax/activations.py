"""Activations on disk: arrays (n, T, hidden) that pass through memory a few windows at a time.

More calibration tokens then cost disk and time, not memory. Values are bfloat16, stored as its bits
in .npy files. A file is mapped for the length of one read or write only, so that its pages do not
stay in the resident memory of the process.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np


class Activations:
    """Reads a finished file: `activations[2:4]` is a bfloat16 array in memory, as is [[3, 0]]."""

    def __init__(self, path: Path):
        self.path = path
        self.shape = np.load(path, mmap_mode="r").shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice | np.ndarray) -> np.ndarray:
        return np.array(np.load(self.path, mmap_mode="r")[part]).view(ml_dtypes.bfloat16)


class Writer:
    """Fills a file: `out[2:4] = values` rounds to bfloat16."""

    def __init__(self, path: Path, shape: tuple[int, ...]):
        self.path = path
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=shape)

    def __setitem__(self, part: slice, values) -> None:
        bits = np.asarray(values).astype(ml_dtypes.bfloat16).view(np.uint16)
        np.load(self.path, mmap_mode="r+")[part] = bits


@contextlib.contextmanager
def writing(path: Path, shape: tuple[int, ...]) -> Iterator[Writer]:
    """A Writer whose file gets its name when the block ends, and disappears if it raises."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield Writer(partial, shape)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)
