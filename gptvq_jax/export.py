"""Dequantizes a packed checkpoint into the files that transformers and most other tools load."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from gptvq_jax.checkpoint import PackedCheckpoint
from gptvq_jax.tree_io import cast_dense, check_dense_dtype


def hf_dense(
    checkpoint: PackedCheckpoint,
    output_dir: str | os.PathLike,
    dtype: str = "float32",
    shard_bytes: int = 2 * 10**9,
    on_block: Callable[[], None] = lambda: None,
) -> None:
    """Writes the dequantized model in Hugging Face's layout: config, safetensors, tokenizer.

    Blocks are streamed; memory holds a block and a shard. The directory appears under its name only
    when it is whole.

    Args:
      checkpoint: a complete one.
      output_dir: new or empty directory.
      dtype: 'float32' (exact), 'float16' or 'bfloat16'.
      shard_bytes: size of a file, at most, unless one tensor is larger.
      on_block: called after every block.

    Raises:
      ValueError: `output_dir` is in use or cannot be written, or a weight overflows `dtype`.
    """
    check_dense_dtype(dtype)
    output_dir = Path(output_dir).absolute()
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} exists and is not an empty directory; choose another")
    partial = output_dir.with_name(f"{output_dir.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an interrupted export
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(
            f"cannot write to {output_dir.parent}: {error.strerror}; choose another directory"
        ) from error
    try:
        config = checkpoint.config.to_hf() | {"torch_dtype": dtype}
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        shutil.copytree(checkpoint.directory / "tokenizer", partial, dirs_exist_ok=True)
        tensors = (
            (name, cast_dense(array, dtype, name)) for name, array in _tensors(checkpoint, on_block)
        )
        _write_shards(tensors, partial, shard_bytes)
        partial.replace(output_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def hf_tensors(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Renames a parameter tree: ("model.layers.0.self_attn.q_proj.weight", (out, in)), ...

    Args:
      params: the tree of models/llama.py, or a part of it.
      prefix: names of the modules around that part, as in "layers_0/".
    """
    for name, array in traverse_util.flatten_dict(params, sep="/").items():
        module, _, leaf = (prefix + name).rpartition("/")
        module = re.sub(r"^layers_(\d+)", r"layers/\1", module).replace("/", ".")
        if module != "lm_head":
            module = f"model.{module}"
        yield f"{module}.weight", np.ascontiguousarray(array.T if leaf == "kernel" else array)


def _tensors(checkpoint: PackedCheckpoint, on_block) -> Iterator[tuple[str, np.ndarray]]:
    for index in range(checkpoint.config.num_hidden_layers):
        yield from hf_tensors(checkpoint.block(index), f"layers_{index}/")
        on_block()
    yield from hf_tensors(checkpoint.outer())


def _write_shards(
    tensors: Iterator[tuple[str, np.ndarray]], directory: Path, shard_bytes: int
) -> None:
    """Fills files in the order of `tensors`, and indexes them if there is more than one."""
    shards: list[list[str]] = []
    total = size = 0
    shard: dict[str, np.ndarray] = {}

    def write():
        save_file(shard, directory / f"{len(shards)}.part", metadata={"format": "pt"})
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
