"""A tensor of a safetensors file, read a few rows at a time.

The file is read plainly, not through a map of it: where a map meets a file cut short, it kills the
process.
"""

import dataclasses
import json
import math
import os
from pathlib import Path

import ml_dtypes
import numpy as np

# safetensors' names of the dtypes that are read.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
}


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """Where a tensor lies: `tensor[2:4]` is an array of these rows in memory, as stored.

    Raises:
      ValueError: the file is not the one that was opened; from reading.
    """

    path: Path
    dtype_name: str  # safetensors' own
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    file_bytes: int  # size of the file when it was opened

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.dtype_name]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        values = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        self.read(start, values)
        return values

    def read(self, start: int, into: np.ndarray) -> None:
        """Fills a contiguous array (n, ...) with rows from `start` on.

        Raises:
          ValueError: see above.
        """
        offset = self.offset + start * math.prod(self.shape[1:]) * self.dtype.itemsize
        with open(self.path, "rb", buffering=0) as file:
            found = os.fstat(file.fileno()).st_size
            if found != self.file_bytes:
                raise ValueError(
                    f"{self.path} has changed since it was opened: it has {found} bytes, not "
                    f"{self.file_bytes}"
                )
            file.seek(offset)
            _fill(file, into.reshape(-1).view(np.uint8), self.path)


def _fill(file, into: np.ndarray, path: Path) -> None:
    """Reads until an array of bytes is full; one read gives at most 2 GiB."""
    done = 0
    while done < len(into):
        count = file.readinto(into[done:])
        if not count:
            raise ValueError(f"{path} was cut short while it was read")
        done += count


def read_header(path: Path) -> tuple[int, dict[str, FileTensor]]:
    """Where the data of a safetensors file begin, and {name: tensor}.

    The file must have been checked: safetensors compares offsets, shapes and size as it opens one.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        size = os.fstat(file.fileno()).st_size
    header.pop("__metadata__", None)
    start = 8 + length
    return start, {
        name: FileTensor(
            path, info["dtype"], tuple(info["shape"]), start + info["data_offsets"][0], size
        )
        for name, info in header.items()
    }
