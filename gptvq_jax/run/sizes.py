"""Bytes of what is stored, from shapes alone; no array is read or made."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gptvq_jax.config import RunSettings
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.source import block_shapes, layer_shapes, outer_shapes
from gptvq_jax.storage.overhead import checkpoint_overhead
from gptvq_jax.storage.tree_io import DENSE_DTYPES

_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")


def stored_bytes(
    config: ModelConfig, settings: RunSettings, plan: Mapping[tuple[int, str], Any]
) -> int:
    """Of a packed checkpoint, at most.

    Args:
      config: of the model.
      settings: of the run.
      plan: settings of layers that differ from `settings.method_settings`, by (block, layer).
    """
    item = DENSE_DTYPES[settings.dense_dtype].itemsize
    size = checkpoint_overhead(config)
    for name, shape in outer_shapes(config).items():
        int8 = settings.embeddings == "int8" and name.endswith(_EMBEDDINGS)
        size += math.prod(shape) + 4 * shape[0] if int8 else math.prod(shape) * item
    groups = settings.calibration.gradient_groups or 1
    depth = config.num_hidden_layers
    for index in range(depth):
        block = config.of_block(index)
        size += sum(math.prod(shape) for shape in block_shapes(block).values()) * item
        layers = layer_shapes(block) if index < (settings.num_blocks or depth) else {}
        for name, shape in layers.items():
            chosen = plan.get((index, name), settings.method_settings)
            size += packed_bytes(settings.method, chosen, *shape, groups)
            size -= math.prod(shape) * item
    return size


@functools.cache
def packed_bytes(method: str, settings: Any, rows: int, cols: int, groups: int = 1) -> int:
    """Of a quantized layer; at most, where a method is given a budget of bytes.

    Args:
      method: name in METHODS.
      settings: of the method.
      rows, cols: shape of the weight.
      groups: of rows, each quantized by itself.
    """
    if hasattr(settings, "budget_bytes"):  # which it never exceeds
        return groups * settings.budget_bytes(rows // groups, cols)
    if hasattr(settings, "polish_rounds"):  # which change no shape
        settings = dataclasses.replace(settings, polish_rounds=0)
    square = jax.ShapeDtypeStruct((cols, cols), jnp.float32)
    tensor = jax.eval_shape(
        functools.partial(METHODS[method].quantize, settings=settings),
        jax.ShapeDtypeStruct((rows // groups, cols), jnp.float32),
        square,
        square,
        jax.random.key(0),
    )
    return groups * tensor.num_bytes
