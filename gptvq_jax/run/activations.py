"""Activations on disk: arrays (n, T, hidden) that pass through memory a few windows at a time.

More tokens then cost disk and time, not memory. Values are bfloat16, stored as its bits in .npy
files, or float32. They are read and written plainly, not through a map of the file: where a map
meets a full disk or a file cut short, it kills the process.
"""

import contextlib
import errno
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from gptvq_jax.files import durable, sharing
from gptvq_jax.files.durable import replacing

BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
_STORED = {BFLOAT16: np.dtype(np.uint16), FLOAT32: FLOAT32}  # .npy has no name for bfloat16

_HEADER = 128  # bytes, which numpy fills up to a multiple of 64


class Activations:
    """Reads a finished file: `activations[2:4]` is an array in memory, as is [[3, 0]].

    `dtype` is that of its values, bfloat16 or float32.

    Raises:
      ValueError: the file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            header = np.lib.format.open_memmap(path, mode="r")  # which also checks the size
        except (ValueError, EOFError, SyntaxError) as error:
            raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error
        dtypes = [dtype for dtype, stored in _STORED.items() if stored == header.dtype]
        if not dtypes or header.ndim != 3:
            raise ValueError(f"{path} is damaged: it holds {header.dtype} of shape {header.shape}")
        self.shape, self.dtype, self._start = header.shape, dtypes[0], header.offset

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice | np.ndarray) -> np.ndarray:
        windows = np.arange(len(self))[part]
        values = np.empty((len(windows), *self.shape[1:]), _STORED[self.dtype])
        with open(self.path, "rb") as file:
            for window, into in zip(windows, values, strict=True):
                file.seek(self._start + int(window) * into.nbytes)
                if file.readinto(into) != into.nbytes:
                    raise ValueError(f"{self.path} was cut short while it was read")
        return values.view(self.dtype)


class Writer:
    """Fills a file: `out[2:4] = values` rounds to its dtype, bfloat16 or float32.

    Where several processes share the directory, all of them fill it: one begins, the others join.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype = BFLOAT16):
        self.shape, self.dtype = shape, dtype
        if not sharing.writes():
            sharing.meet()
        self._file = open(path, "wb" if sharing.writes() else "r+b")  # noqa: SIM115 - until close
        try:
            self._start = self._begin()
        except BaseException:
            self._file.close()
            raise
        if sharing.writes():
            sharing.meet()

    def _begin(self) -> int:
        """Writes the header and takes the room of the rest; returns where that starts."""
        shape, descr = tuple(map(int, self.shape)), _STORED[self.dtype].str
        header, text = {"descr": descr, "fortran_order": False, "shape": shape}, io.BytesIO()
        np.lib.format.write_array_header_1_0(text, header)
        start = text.tell()
        if sharing.writes():
            self._file.write(text.getvalue())
            self._file.flush()
            _reserve(self._file.fileno(), start + num_bytes(self.shape, self.dtype))
        return start

    def __setitem__(self, part: slice, values) -> None:
        start, stop, _ = part.indices(self.shape[0])
        values = np.ascontiguousarray(np.asarray(values).astype(self.dtype, copy=False))
        if values.shape != (stop - start, *self.shape[1:]):
            raise ValueError(f"{values.shape=} must be {(stop - start, *self.shape[1:])}")
        self._file.seek(self._start + start * num_bytes(self.shape[1:], self.dtype))
        self._file.write(values.view(_STORED[self.dtype]))

    def close(self) -> None:
        """Returns once all processes have filled their parts."""
        self._file.close()
        sharing.meet()


@contextlib.contextmanager
def writing(path: Path, shape: tuple[int, ...], dtype: np.dtype = BFLOAT16) -> Iterator[Writer]:
    """A Writer whose file gets its name when the block ends, and disappears if it raises.

    Raises:
      FullDiskError: there is no room for the whole of it.
    """
    size = num_bytes(shape, dtype)
    if sharing.count() == 1:
        with replacing(path, size) as partial, _closed(Writer(partial, shape, dtype)) as out:
            yield out
        return
    # All write to the file that one of them gives its name, once it has it on the disk.
    with _closed(Writer(path.with_name(f"{path.name}.partial"), shape, dtype)) as out:
        yield out
    sharing.by_writer(lambda: _finish(path))


@contextlib.contextmanager
def _closed(out: Writer) -> Iterator[Writer]:
    """Closes it; where an error leaves the block nobody is waited for."""
    try:
        yield out
    except BaseException:
        out._file.close()
        raise
    out.close()


def _finish(path: Path) -> None:
    partial = path.with_name(f"{path.name}.partial")
    durable.sync(partial)
    durable.rename(partial, path)


def file_bytes(shape: tuple[int, ...], dtype: np.dtype = BFLOAT16) -> int:
    """Of such a file."""
    return num_bytes(shape, dtype) + _HEADER


def num_bytes(shape: tuple[int, ...], dtype: np.dtype = BFLOAT16) -> int:
    """Of an array of activations on the disk, without its header."""
    return math.prod(map(int, shape)) * dtype.itemsize


def _reserve(descriptor: int, size: int) -> None:
    """Takes the room of a whole file, so that a full disk shows before hours of work."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (OSError, AttributeError) as error:
        # Where the filesystem or the system cannot, a write will say that the disk is full.
        cannot = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
        if isinstance(error, OSError) and error.errno not in cannot:
            raise
        os.ftruncate(descriptor, size)
