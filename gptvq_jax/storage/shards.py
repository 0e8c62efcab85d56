"""Safetensors files as transformers writes them: one, or several of limited size with an index."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gptvq_jax.files.disk_space import naming_full_disk


def write_shards(
    tensors: Iterable[tuple[str, np.ndarray]], directory: Path, shard_bytes: int
) -> None:
    """Fills files in the order of `tensors`, and indexes them if there is more than one.

    Args:
      tensors: (name, array) pairs; memory holds those of one file.
      directory: gets model.safetensors, or model-00001-of-00002.safetensors, ... and their index.
      shard_bytes: size of a file, at most, unless one tensor is larger.

    Raises:
      FullDiskError: the disk is full.
    """
    shards: list[list[str]] = []
    total = size = 0
    shard: dict[str, np.ndarray] = {}

    def write():
        path = directory / f"{len(shards)}.part"
        with naming_full_disk(path, size):
            save_file(shard, path, metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, array in tensors:
        if shard and size + array.nbytes > shard_bytes:
            write()
            size = 0
        shard[name] = array
        size += array.nbytes
        total += array.nbytes
    write()

    if len(shards) == 1:
        (directory / "0.part").replace(directory / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{number}.part").replace(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
