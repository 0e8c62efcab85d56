"""A safetensors file written a few rows at a time: memory holds one piece, however large it is."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptvq_jax.files import durable
from gptvq_jax.models.file_tensor import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNED = 8  # bytes, where the data begin


class Slot(NamedTuple):
    """A tensor that is to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_stream(
    path: Path, slots: Mapping[str, Slot], pieces: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes a file that is there whole or not at all.

    Args:
      path: of the file.
      slots: what it holds, by name.
      pieces: (name, values) in the order of `slots`, each tensor's values in as many pieces as one
        likes, in order.

    Raises:
      ValueError: the pieces are not those of the slots.
      FullDiskError: the disk is full.
    """
    header = _header(slots)
    total = len(header) + sum(slot.num_bytes for slot in slots.values())
    with durable.replacing(path, total) as partial, partial.open("wb") as file:
        file.write(header)
        for values in _in_order(slots, pieces):
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def stream_bytes(slots: Mapping[str, Slot]) -> int:
    """Of the file that `write_stream` makes."""
    return len(_header(slots)) + sum(slot.num_bytes for slot in slots.values())


def _header(slots: Mapping[str, Slot]) -> bytes:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, slot in slots.items():
        span = [at, at + slot.num_bytes]
        dtype = _NAMES[slot.dtype]
        entries[name] = {"dtype": dtype, "shape": list(slot.shape), "data_offsets": span}
        at = span[1]
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text


def _in_order(
    slots: Mapping[str, Slot], pieces: Iterable[tuple[str, np.ndarray]]
) -> Iterator[np.ndarray]:
    """The values, once it is seen that they are those of their slots."""
    left = {name: slot.num_bytes for name, slot in slots.items()}
    waiting = iter(left)
    current = None
    for name, values in pieces:
        while current != name and (current is None or left[current] == 0):
            current = next(waiting, None)
            if current is None:
                break
        if name != current or values.dtype != slots[name].dtype or values.nbytes > left[name]:
            raise ValueError(f"{name}: these values are not the next of the file")
        left[name] -= values.nbytes
        yield values
    if any(left.values()):
        missing = next(name for name, count in left.items() if count)
        raise ValueError(f"{missing}: {left[missing]} bytes of its values are missing")
