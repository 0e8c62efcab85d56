"""The embedding and a head of its own, as a recipe or `embeddings` wants them stored.

They have no Hessian of the calibration text: every row of an embedding is read as it is, and all
errors of a row count alike, in the head too.
"""

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gptvq_jax.config import RunSettings
from gptvq_jax.core.hessian import Factor
from gptvq_jax.core.int8_rows import int8_rows
from gptvq_jax.core.quantized_tensor import QuantizedTensor, dequantize_compiled
from gptvq_jax.methods.layer import Objective, Problem, most_flops, quantize_layers
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.recipe import EMBEDDING, HEAD, rule_text
from gptvq_jax.rule_settings import Format
from gptvq_jax.rules import DENSE, INT8
from gptvq_jax.run.context import Context
from gptvq_jax.run.formats import outer_formats
from gptvq_jax.run.layer_rows import layer_row
from gptvq_jax.storage.tree_io import cast_dense

_LEAVES = {EMBEDDING: "embedding", HEAD: "kernel"}


def outer_steps(settings: RunSettings, config: ModelConfig) -> int:
    """By how much `stored_outer` advances the progress: matrices that a method quantizes."""
    formats = outer_formats(settings, config).values()
    return sum(of.method not in (DENSE, INT8) for of in formats)


def stored_outer(
    context: Context, outer: Mapping[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Quantizes what is outside the blocks.

    Args:
      context: of the run.
      outer: its tree, of host arrays in float32.

    Returns:
      The tree with a QuantizedTensor (vocab, hidden) in place of each matrix that is not dense; and
      metrics of those that have a rule of a recipe.

    Raises:
      ValueError: a value is too large for its storage.
    """
    stored, rows = traverse_util.flatten_dict(outer), []
    formats = outer_formats(context.settings, context.source.config)
    for number, (name, of) in enumerate(formats.items()):
        leaf = name, _LEAVES[name]
        weight = stored[leaf].T if name == HEAD else stored[leaf]
        if of.rule is not None:
            tensor, row = _ruled(context, name, weight, of, number)
            rows.append(row)
            if of.method != DENSE:
                stored[leaf] = tensor
        elif of.method == INT8:
            stored[leaf] = _int8(name, weight)
    return traverse_util.unflatten_dict(stored), rows


def _ruled(
    context: Context, name: str, weight: np.ndarray, of: Format, number: int
) -> tuple[QuantizedTensor | np.ndarray, dict[str, Any]]:
    """A matrix (vocab, hidden) as its rule wants it stored, and its row of metrics."""
    settings, start = context.settings, time.perf_counter()
    whole = jnp.eye(weight.shape[1])
    key = jax.random.key(settings.seed)
    problem = Problem(
        METHODS[of.coder].quantize if of.coder else None,
        of.settings,
        jnp.asarray(weight),
        [Objective(whole, Factor(whole, 0.0))],
        jax.random.fold_in(key, context.source.config.num_hidden_layers + number),
        name=name,
    )
    if of.method == DENSE:
        stored = cast_dense(weight, settings.dense_dtype, name)
    elif of.method == INT8:
        stored = _int8(name, weight)
    else:
        context.progress.note(name)
        context.stopwatch.flops(most_flops(problem))
        (stored,) = quantize_layers([problem])
        context.progress.advance(name)
    kernel = dequantize_compiled(stored) if isinstance(stored, QuantizedTensor) else stored
    row = {
        "kind": "outer",
        "layer": name,
        **layer_row(problem, stored, jnp.asarray(kernel, jnp.float32), []),
        "method": of.method,
        "rule": rule_text(settings.recipe, of.rule),
        "seconds": time.perf_counter() - start,
    }
    return stored, row


def _int8(name: str, weight: np.ndarray) -> QuantizedTensor:
    """`int8_rows` of a matrix (vocab, hidden); errors begin with its name."""
    try:
        return int8_rows(weight)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; keep it dense: embeddings='dense'") from error
