"""How long a block takes to load, against what it cannot take less than: reading and casting it."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.models.file_tensor import FileTensor, read_header
from gptvq_jax.models.open import open_source
from gptvq_jax.study.random_model import write_random_llama

_cast = jax.jit(lambda stored: stored.astype(jnp.float32))


def measure(directory: Path, hidden: int, wide: int, head_dim: int, repeats: int) -> dict[str, Any]:
    """Seconds that one block of a random model takes, whose file is in the page cache.

    Args:
      directory: to be made, for a model of two blocks in bfloat16.
      hidden, wide, head_dim: sizes of it; 4096, 11008 and 128 are those of Llama-2-7B.
      repeats: of all measurements in turn, of each block.

    Returns:
      Seconds, the least of all rounds: "read" the bytes of a block; "cast_host", read and cast them
      by NumPy; "cast_device", read them and cast them by XLA on the device; "load" the block. And
      "bytes" of a block, "ratio" of "load" to the faster cast.
    """
    write_random_llama(
        directory, None, num_blocks=2, hidden=hidden, head_dim=head_dim, wide=wide, vocab_size=256
    )
    source = open_source(str(directory))
    _, tensors = read_header(directory / "model.safetensors")
    blocks = [
        [tensor for name, tensor in tensors.items() if name.startswith(f"model.layers.{index}.")]
        for index in range(2)
    ]
    ways: dict[str, Callable[[int], Any]] = {
        "read": lambda index: _read(blocks[index]),
        "cast_host": lambda index: [x.astype(np.float32) for x in _read(blocks[index])],
        "cast_device": lambda index: [_cast(x) for x in _read(blocks[index])],
        "load": source.block,
    }
    row: dict[str, Any] = dict.fromkeys(ways, math.inf)
    for _ in range(repeats):
        for index in range(2):
            for name, way in ways.items():
                row[name] = min(row[name], _seconds(way, index))
    row["ratio"] = row["load"] / min(row["cast_host"], row["cast_device"])
    row["bytes"] = sum(int(np.prod(tensor.shape)) * tensor.dtype.itemsize for tensor in blocks[0])
    return row


def _read(tensors: list[FileTensor]) -> list[np.ndarray]:
    return [tensor[:] for tensor in tensors]


def _seconds(way: Callable[[int], Any], index: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready(way(index))
    return time.perf_counter() - start
