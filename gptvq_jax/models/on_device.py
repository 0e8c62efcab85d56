"""Tensors of a checkpoint as float32 arrays on the device, kernels (in, out).

Checkpoints store weights (out, in), mostly in 16 bits; Flax multiplies by kernels (in, out). A
device casts, transposes and checks what was sent to it as it is stored. On a CPU that takes XLA
1.7 s for the block of a 7B model (2 cores of a Zen 4): its transpose strides through memory, its
check is a loop of one thread, and its results come in pages of 4 KiB. So there threads of the host
do it, a few rows at a time in their caches, and the result becomes an array of the device without a
copy: scripts/benchmark_loading.py compares that with reading and casting alone.
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

_ALIGNMENT = 64  # bytes, at which a CPU device shares an array of the host
_ROWS = 256  # of a stored weight that are in the caches of a core at once
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
        kernel = _aligned(stored.shape[::-1])

        def convert(rows: slice) -> bool:
            part = stored[rows]
            # A CPU device transposes what it is given with other strides, faster than NumPy does.
            columns = np.asarray(jax.device_put(part.T))
            _widen(columns, kernel[..., rows])
            return _all_finite(part)

        finite = all(list(self._pool.map(convert, _parts(stored.shape[0]))))
        return jax.device_put(kernel), finite


def _send(stored: Stored) -> tuple[jax.Array, jax.Array]:
    return _cast(jax.device_put(stored[:]))


@jax.jit
def _cast(stored: jax.Array) -> tuple[jax.Array, jax.Array]:
    return stored.T.astype(jnp.float32), jnp.isfinite(stored).all()


def _parts(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS))


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
