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
from gptvq_jax.models.source import block_shapes, outer_shapes
from gptvq_jax.rule_settings import Format
from gptvq_jax.rules import DENSE, INT8
from gptvq_jax.run.formats import layer_format, linear_layers, outer_formats, outer_matrices
from gptvq_jax.storage.overhead import checkpoint_overhead
from gptvq_jax.storage.tree_io import DENSE_DTYPES


def stored_bytes(
    config: ModelConfig, settings: RunSettings, plan: Mapping[tuple[int, str], Any]
) -> int:
    """Of a packed checkpoint, at most.

    Args:
      config: of the model.
      settings: of the run.
      plan: settings of layers that a budget had a say in, by (block, layer).
    """
    item = dense_item(settings)
    size = checkpoint_overhead(config)
    size += sum(math.prod(shape) for shape in outer_shapes(config).values()) * item
    matrices = outer_matrices(config)
    for name, of in outer_formats(settings, config).items():
        rows, cols = matrices[name]
        size -= rows * cols * item
        size += rows * cols + 4 * rows if of.method == INT8 else format_bytes(of, rows, cols, item)
    for block, count in config.block_counts().items():
        size += count * sum(math.prod(shape) for shape in block_shapes(block).values()) * item
    groups = settings.calibration.gradient_groups or 1
    for layer, shape in linear_layers(settings, config).items():
        size += format_bytes(layer_format(settings, *layer, plan), *shape, item, groups)
        size -= math.prod(shape) * item
    return size


def format_bytes(of: Format, rows: int, cols: int, item: int, groups: int = 1) -> int:
    """Of a layer in a format, as `packed_bytes`; one that stays dense has `item` bytes a value."""
    if of.method == DENSE:
        return rows * cols * item
    return packed_bytes(of.coder, of.settings, rows, cols, groups)


def dense_item(settings: RunSettings) -> int:
    """Bytes of a value of what stays dense."""
    return DENSE_DTYPES[settings.dense_dtype].itemsize


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
