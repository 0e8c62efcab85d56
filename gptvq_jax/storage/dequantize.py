"""Stored trees of packed weights as the float32 weights that they stand for."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gptvq_jax.core.int8_rows import dequantize_rows, is_int8_rows
from gptvq_jax.core.quantized_tensor import QuantizedTensor, dequantize_compiled
from gptvq_jax.storage.tree_io import Tree

_EMBEDDING_MATRICES = ("embed_tokens/embedding", "lm_head/kernel")


def dequantize_tree(tree: Mapping[str, Any]) -> Tree:
    """Every leaf as a float32 host array.

    A quantized tensor named 'kernel', of an (out, in) weight, becomes (in, out) as in Flax; under
    any other name, such as 'embedding', it keeps its orientation.
    """

    def dense(name, leaf):
        if not isinstance(leaf, QuantizedTensor):
            return np.asarray(leaf, np.float32)
        by_rows = name in _EMBEDDING_MATRICES and is_int8_rows(leaf)
        weight = dequantize_rows(leaf) if by_rows else np.asarray(dequantize_compiled(leaf))
        return weight.T if name.endswith("kernel") else weight

    flat = traverse_util.flatten_dict(tree, sep="/")
    return traverse_util.unflatten_dict({n: dense(n, v) for n, v in flat.items()}, sep="/")


def dequantize_block(block: Mapping[str, Any]) -> Tree:
    """A packed block with every leaf in float32 on the device, kernels (in, out)."""

    def dense(leaf: QuantizedTensor | np.ndarray) -> jax.Array:
        if isinstance(leaf, QuantizedTensor):
            return dequantize_compiled(leaf).T
        return jnp.asarray(leaf, jnp.float32)

    return jax.tree.map(dense, block, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
