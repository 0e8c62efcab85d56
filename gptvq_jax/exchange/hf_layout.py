"""What every directory that transformers loads has, dense or packed, and how it is written."""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.exchange.aqlm_format import aqlm_format, to_aqlm
from gptvq_jax.files.disk_space import directory_bytes
from gptvq_jax.files.new_directory import new_directory
from gptvq_jax.models.companions import write_companions
from gptvq_jax.models.shapes import Named, fused, stored_module
from gptvq_jax.models.tokenizer_files import make_portable
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.shards import write_shards
from gptvq_jax.storage.tensor_io import abstract_tensor
from gptvq_jax.storage.tree_io import DENSE_DTYPES, cast_dense, check_dense_dtype, write_json

_CONFIG_BYTES = 1 << 16
_ENTRY_BYTES = 1024  # of the names of a layer in the headers of files and in their index

Params = Mapping[str, Any]


def hf_tensors(params: Params, prefix: str = "", dtype: str = "float32") -> Iterator[Named]:
    """Renames a parameter tree: ("model.layers.0.self_attn.q_proj.weight", (out, in)), ...

    A quantized one gives ("model.layers.0.self_attn.q_proj.codes", ...), codebooks and scales.

    Args:
      params: the tree of models/llama.py, or a part of it.
      prefix: names of the modules around that part, as in "layers_0/".
      dtype: of dense arrays, a key of DENSE_DTYPES.

    Raises:
      ValueError: a value overflows `dtype`.
    """
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        path = prefix + path
        name = module_name(path)
        if isinstance(leaf, QuantizedTensor):
            yield from ((f"{name}.{part}", array) for part, array in to_aqlm(leaf).items())
        else:
            array = leaf.T if path.endswith("/kernel") else leaf
            full = f"{name}.bias" if path.endswith("/bias") else f"{name}.weight"
            yield full, np.ascontiguousarray(cast_dense(array, dtype, full))


def module_name(path: str) -> str:
    """layers_0/mlp/up_proj/kernel -> model.layers.0.mlp.up_proj."""
    module = stored_module(re.sub(r"^layers_(\d+)", r"layers/\1", path.rpartition("/")[0]))
    return module if module == "lm_head" else f"model.{module}"


def write_model(
    checkpoint: PackedCheckpoint,
    output_dir: str | os.PathLike,
    extra_config: Mapping[str, Any],
    block: Callable[[int], Params],
    dtype: str,
    shard_bytes: int,
    on_block: Callable[[], None],
) -> None:
    """Streams the blocks that `block` returns by index, and the rest, into a new directory."""
    check_dense_dtype(dtype)

    def tensors():
        for index in range(checkpoint.config.num_hidden_layers):
            of_block = hf_tensors(block(index), f"layers_{index}/", dtype)
            yield from fused(checkpoint.config, of_block)
            on_block()
        yield from hf_tensors(checkpoint.outer(), dtype=dtype)

    num_bytes = _num_bytes(checkpoint, dtype, packed=bool(extra_config))
    with new_directory(output_dir, num_bytes) as partial:
        config = checkpoint.config.to_hf() | {"torch_dtype": dtype} | extra_config
        write_json(partial / "config.json", config)
        write_companions(checkpoint.companions(), partial)
        make_portable(partial)
        write_shards(tensors(), partial, shard_bytes)


def _num_bytes(checkpoint: PackedCheckpoint, dtype: str, packed: bool) -> int:
    """Of the files of an export, at most."""
    item = DENSE_DTYPES[dtype].itemsize
    size = directory_bytes(checkpoint.directory / "tokenizer") + _CONFIG_BYTES
    for section in ("layers", "embeddings", "dense"):
        for meta in checkpoint.manifest.get(section, {}).values():
            if packed and section == "layers":
                fmt = aqlm_format(abstract_tensor(meta))
                codes, codebooks, scales = map(math.prod, fmt.shapes(*meta["shape"]).values())
                size += codes * fmt.code_dtype.itemsize + 2 * (codebooks + scales)
            else:
                size += math.prod(meta["shape"]) * item
            size += _ENTRY_BYTES
    return size
