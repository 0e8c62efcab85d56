"""Tensors of a checkpoint as float32 arrays on the device, kernels (in, out).

Checkpoints store weights (out, in), mostly in 16 bits; Flax multiplies by kernels (in, out). A
device casts, transposes and checks what was sent to it as it is stored. On a CPU that takes XLA
1.7 s for the block of a 7B model (2 cores of a Zen 4): its transpose strides through memory, its
check is a loop of one thread, and its results come in pages of 4 KiB. So there threads of the host
do it, as many columns at a time as their caches hold, and the result becomes an array of the device
without a copy: scripts/benchmark_loading.py compares that with reading and casting alone.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gptvq_jax.models.file_tensor import FileTensor

_ALIGNMENT = 64  # bytes, at which a CPU device shares an array of the host
_READ_ROWS = 256  # of a stored weight, by one thread at a time
_COLUMNS = 128  # likewise, when it is transposed: rows of the result, written one after another
_BITS = {2: np.uint16, 4: np.uint32}  # by the bytes of a dtype


class Stored(Protocol):
    """A weight (out, in) or a vector of bfloat16, float16 or float32: array or FileTensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, rows: slice) -> np.ndarray: ...


class Loader:
    """Puts tensors on the device and remembers whether they were finite.

    Use it as a context; `check` comes after all `load`.

    Args:
      platform: of the device, by default JAX's.
    """

    def __init__(self, platform: str | None = None):
        self._on_host = (platform or jax.default_backend()) == "cpu"
        self._pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1), "load tensor")
        self._finite: list[tuple[str, Path, jax.Array | bool]] = []
        self._buffer = np.empty(0, np.uint8)  # what was read of one tensor

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)

    def load(self, stored: Stored, name: str, path: Path) -> jax.Array:
        """The transpose of a stored weight, or a vector, in float32.

        Args:
          stored: the tensor.
          name, path: of it and of its file, for `check`.
        """
        convert = self._convert if self._on_host else _send
        array, finite = convert(stored)
        self._finite.append((name, path, finite))
        return array

    def check(self) -> None:
        """Waits for all that was loaded.

        Raises:
          ValueError: a value is not finite; names the first such tensor.
        """
        flags = np.asarray(jnp.stack([finite for *_, finite in self._finite]))
        if not flags.all():
            name, path, _ = self._finite[int(np.argmin(flags))]
            raise ValueError(f"{path}: tensor {name} contains NaN or Inf")

    def _convert(self, stored: Stored) -> tuple[jax.Array, bool]:
        values = self._read(stored) if isinstance(stored, FileTensor) else stored
        values = values.reshape(len(values), -1)
        kernel = _aligned(values.shape[::-1])

        def convert(columns: slice) -> bool:
            # A CPU device transposes what it is given with other strides, faster than NumPy does.
            rows = np.asarray(jax.device_put(values[:, columns].T))
            _widen(rows, kernel[columns])
            return _all_finite(rows)

        finite = all(list(self._pool.map(convert, _parts(len(kernel), _COLUMNS))))
        return jax.device_put(kernel.reshape(stored.shape[::-1])), finite

    def _read(self, tensor: FileTensor) -> np.ndarray:
        """The tensor as stored, in memory that the next one will take."""
        size = int(np.prod(tensor.shape)) * tensor.dtype.itemsize
        if size > len(self._buffer):
            self._buffer = np.empty(size, np.uint8)
        values = self._buffer[:size].view(tensor.dtype).reshape(tensor.shape)

        def read(rows: slice) -> None:
            tensor.read(rows.start, values[rows])

        list(self._pool.map(read, _parts(tensor.shape[0], _READ_ROWS)))
        return values


def _send(stored: Stored) -> tuple[jax.Array, jax.Array]:
    return _cast(jax.device_put(stored[:]))


@jax.jit
def _cast(stored: jax.Array) -> tuple[jax.Array, jax.Array]:
    return stored.T.astype(jnp.float32), jnp.isfinite(stored).all()


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _widen(values: np.ndarray, out: np.ndarray) -> None:
    """out = values as float32, without Python's lock."""
    if values.dtype == ml_dtypes.bfloat16:  # the upper half of a float32
        bits = out.view(np.uint32)
        np.left_shift(values.view(np.uint16), 16, out=bits, dtype=np.uint32)
    else:
        np.copyto(out, values)


def _all_finite(values: np.ndarray) -> bool:
    """Whether no exponent is all ones."""
    bits = _BITS[values.dtype.itemsize]
    ones = np.array(np.inf, values.dtype).view(bits)
    return values.size == 0 or bool((values.view(bits) & ones).max() < ones)


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An uninitialized float32 array that a CPU device can share."""
    size = 4 * int(np.prod(shape))
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(np.float32).reshape(shape)
