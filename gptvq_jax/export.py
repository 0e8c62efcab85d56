"""Writes a packed checkpoint as a directory that transformers and most other tools load."""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from gptvq_jax.aqlm_format import AQLMFormat, aqlm_format, to_aqlm
from gptvq_jax.checkpoint import PackedCheckpoint
from gptvq_jax.disk_space import directory_bytes
from gptvq_jax.models.companions import write_companions
from gptvq_jax.models.tokenizer_files import make_portable
from gptvq_jax.new_directory import new_directory
from gptvq_jax.shards import write_shards
from gptvq_jax.tensor_io import abstract_tensor
from gptvq_jax.tree_io import DENSE_DTYPES, cast_dense, check_dense_dtype, write_json
from gptvq_jax.vq_tensor import VQTensor

_CONFIG_BYTES = 1 << 16
_ENTRY_BYTES = 1024  # of the names of a layer in the headers of files and in their index

Params = Mapping[str, Any]
Named = tuple[str, np.ndarray]


def hf_dense(
    checkpoint: PackedCheckpoint,
    output_dir: str | os.PathLike,
    dtype: str = "float32",
    shard_bytes: int = 2 * 10**9,
    on_block: Callable[[], None] = lambda: None,
) -> None:
    """Writes the dequantized model in Hugging Face's layout: config, safetensors, tokenizer.

    The other files that transformers reads with a model go along, as the source had them.

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
      FullDiskError: there is no room; nothing is left then.
    """
    _write(checkpoint, output_dir, {}, checkpoint.block, dtype, shard_bytes, on_block)


def hf_aqlm(
    checkpoint: PackedCheckpoint,
    output_dir: str | os.PathLike,
    dtype: str = "float16",
    shard_bytes: int = 2 * 10**9,
    on_block: Callable[[], None] = lambda: None,
) -> None:
    """Writes the packed model as transformers loads it with the aqlm package (aqlm_format.py).

    Arguments are those of `hf_dense`, but for this one.

    Args:
      dtype: of what is not quantized, and the one in which transformers computes by default.

    Raises:
      NotImplementedError: a layer does not fit the format; says which, why, and what does.
      ValueError: `output_dir` is in use or cannot be written, or a value overflows its dtype.
    """
    extra = {"quantization_config": _quantization_config(checkpoint)}
    _write(checkpoint, output_dir, extra, checkpoint.packed_block, dtype, shard_bytes, on_block)


def hf_tensors(params: Params, prefix: str = "", dtype: str = "float32") -> Iterator[Named]:
    """Renames a parameter tree: ("model.layers.0.self_attn.q_proj.weight", (out, in)), ...

    A VQTensor gives ("model.layers.0.self_attn.q_proj.codes", ...), codebooks and scales.

    Args:
      params: the tree of models/llama.py, or a part of it.
      prefix: names of the modules around that part, as in "layers_0/".
      dtype: of dense arrays, a key of DENSE_DTYPES.

    Raises:
      ValueError: a value overflows `dtype`.
    """
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        path = prefix + path
        name = _module(path)
        if isinstance(leaf, VQTensor):
            yield from ((f"{name}.{part}", array) for part, array in to_aqlm(leaf).items())
        else:
            array = leaf.T if path.endswith("/kernel") else leaf
            yield f"{name}.weight", np.ascontiguousarray(cast_dense(array, dtype, f"{name}.weight"))


def _module(path: str) -> str:
    """layers_0/mlp/up_proj/kernel -> model.layers.0.mlp.up_proj."""
    module = re.sub(r"^layers_(\d+)", r"layers/\1", path.rpartition("/")[0]).replace("/", ".")
    return module if module == "lm_head" else f"model.{module}"


def _write(
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
            yield from hf_tensors(block(index), f"layers_{index}/", dtype)
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


def _quantization_config(checkpoint: PackedCheckpoint) -> dict[str, Any]:
    """What config.json says of the layers, once all are known to fit; reads no array."""
    fmt = _common_format(checkpoint.manifest["layers"])
    dense = [_module(name) for name in checkpoint.manifest["dense"] if name.endswith("/kernel")]
    linear = sorted({*dense, "lm_head"})  # a tied head is a linear layer of its own in transformers
    return {
        "quant_method": "aqlm",
        "num_codebooks": fmt.num_codebooks,
        "nbits_per_codebook": fmt.index_bits,
        "in_group_size": fmt.dim,
        "out_group_size": 1,
        # Transformers 4 looks for names of weights, version 5 for names of modules.
        "linear_weights_not_to_quantize": [*linear, *(f"{name}.weight" for name in linear)],
    }


def _common_format(layers: Mapping[str, Any]) -> AQLMFormat:
    """The format of all quantized layers, from their descriptions in the manifest."""
    way_out = "or export with --format=hf-dense"
    formats: dict[str, AQLMFormat] = {}
    for name, meta in layers.items():
        try:
            formats[name] = aqlm_format(abstract_tensor(meta))
        except NotImplementedError as error:
            raise NotImplementedError(f"{name} {error}, {way_out}") from None
        first, fmt = next(iter(formats.items()))
        if formats[name] != fmt:
            raise NotImplementedError(
                f"{name} has codebooks of {formats[name]}, {first} of {fmt}, and the format allows "
                f"one kind; quantize without allocation.bits_per_value, {way_out}"
            )
    if not formats:
        raise NotImplementedError("no layer is quantized; export with --format=hf-dense")
    return fmt
