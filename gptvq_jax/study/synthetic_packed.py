"""A packed checkpoint of a model that exists only as a shape: random codes, made without solving.

A product takes as long with random codes as with good ones, so that speed and memory of serving can
be measured on shapes that would take hours to quantize.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax import traverse_util

from gptvq_jax.console.progress import Progress
from gptvq_jax.files.new_directory import new_directory
from gptvq_jax.models.byte_tokenizer import SPECIAL, byte_tokenizer
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.source import layer_shapes
from gptvq_jax.storage.checkpoint_writer import CheckpointWriter
from gptvq_jax.storage.manifest import leaf_shapes
from gptvq_jax.storage.overhead import checkpoint_overhead
from gptvq_jax.storage.tree_io import Tree
from gptvq_jax.study.decode_formats import check_formats, random_quantized
from gptvq_jax.study.synthetic import model_config

_DENSE = "bfloat16"


def make_packed(like: str, output: str, packed: str, blocks: int = 0, seed: int = 0) -> Path:
    """Writes a complete checkpoint whose linear layers all have one format.

    Memory holds a block, or the embedding and the head in float32. An interrupted run starts anew.

    Args:
      like, blocks: as in `synthetic.hf_fields`.
      output: directory, new or empty.
      packed: a name of decode_formats.FORMATS.
      seed: of codes, codebooks and dense weights.

    Raises:
      ValueError, FileNotFoundError: the model or the format is unknown, or the directory in use.
      FullDiskError: there is no room; nothing is left then.
    """
    check_formats([packed])
    config = model_config(like, blocks)
    depth = config.num_hidden_layers
    with new_directory(output, _num_bytes(config, packed)) as partial:
        writer = CheckpointWriter(partial, _DENSE)
        writer.write_tokenizer(byte_tokenizer(SPECIAL))
        with Progress(depth + 1, "packed model", "part") as progress:
            shapes = leaf_shapes(config, outer=True)
            writer.write_outer(_tree(_dense(config, shapes, seed)))
            progress.advance("outer")
            for index in range(depth):
                block = _block(config.of_block(index), packed, seed + 1 + index)
                writer.write_block(index, block)
                progress.advance(f"block {index}")
        made_by = {"synthetic": packed, "like": like, "seed": seed, "dense_dtype": _DENSE}
        name = f"synthetic {packed}, seed {seed}"
        writer.finalize(made_by, config, name, f"{like} {depth} {packed} {seed}")
    return Path(output)


def _block(config: ModelConfig, packed: str, seed: int) -> Tree:
    shapes = leaf_shapes(config, outer=False)
    layers = {f"{name}/kernel": shape for name, shape in layer_shapes(config).items()}
    rest = {name: shape for name, shape in shapes.items() if name not in layers}
    quantized = {
        name: random_quantized(packed, *shape, seed=1000 * seed + number)
        for number, (name, shape) in enumerate(layers.items())
    }
    return _tree([*_dense(config, rest, seed), *quantized.items()])


def _dense(
    config: ModelConfig, shapes: dict[str, tuple[int, ...]], seed: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Gaussian matrices, kernels (in, out); norms that scale by 1; biases of 0."""
    rng = np.random.default_rng(seed)
    for name, shape in shapes.items():
        if len(shape) == 2:
            values = rng.standard_normal(shape, np.float32) / math.sqrt(shape[1])
            yield name, values.T if name.endswith("/kernel") else values
        else:
            one = 0.0 if name.endswith("/bias") else 1 - config.family.norm_offset
            yield name, np.full(shape, one, np.float32)


def _tree(leaves) -> Tree:
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def _num_bytes(config: ModelConfig, packed: str) -> int:
    """Of all arrays; those of trellis codes differ by a little from seed to seed."""
    sizes = {}
    size = 2 * sum(map(math.prod, leaf_shapes(config, outer=True).values()))
    for index in range(config.num_hidden_layers):
        of_block = config.of_block(index)
        size += 2 * sum(map(math.prod, leaf_shapes(of_block, outer=False).values()))
        for shape in layer_shapes(of_block).values():
            if shape not in sizes:
                sizes[shape] = random_quantized(packed, *shape).num_bytes
            size += sizes[shape] - 2 * math.prod(shape)
    return size + checkpoint_overhead(config)
