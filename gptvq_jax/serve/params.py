"""The parameter tree that generation runs on, held on the device: packed, or dense."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gptvq_jax.core.int8_rows import is_int8_rows
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.core.row_weight import RowWeight
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.experts import stack_experts
from gptvq_jax.models.shapes import block_shapes, outer_shapes
from gptvq_jax.models.source import ModelSource
from gptvq_jax.ops import int8_head
from gptvq_jax.ops.coded_rows import CodedRows
from gptvq_jax.ops.int8_head import Int8Head
from gptvq_jax.ops.vq_matmul import IMPLEMENTATIONS, VQKernel, make_kernel
from gptvq_jax.storage.checkpoint import PackedCheckpoint

Params = dict[str, Any]
Leaf = Callable[[str, Any], Any]  # of a name such as "layers_0/mlp/up_proj/kernel", and its array


def packed_params(checkpoint: PackedCheckpoint, implementation: str = "auto") -> Params:
    """The tree of models/llama.py with packed leaves where dense kernels were, experts stacked.

    Args:
      checkpoint: its dense arrays keep the dtype that they are stored in, float16 by default.
      implementation: of products with quantized layers, see `ops.vq_matmul`. With 'cpu_int8' a
        dense head is rounded to int8 rows, as activations are; looked-up embeddings stay exact.

    Raises:
      ValueError: the checkpoint is damaged, or there is no such implementation.
      NotImplementedError: the named implementation does not support a layer or this platform.
    """
    leaf = packed_leaf(checkpoint.config, implementation)
    return _load(checkpoint.config, checkpoint.packed_outer, checkpoint.packed_block, leaf)


def packed_leaf(config: ModelConfig, implementation: str) -> Leaf:
    """What becomes of the arrays of a packed checkpoint of this model; as `packed_params`."""
    tied = config.tie_word_embeddings
    head = "embed_tokens/embedding" if tied else "lm_head/kernel"

    def leaf(name: str, stored: Any) -> Any:
        if not isinstance(stored, QuantizedTensor):
            if name == head and implementation == "cpu_int8" and int8_head.can_run():
                return Int8Head.rounded(stored if tied else stored.T, tied)
            return _dense_leaf(name, stored)
        if is_int8_rows(stored):
            rows = RowWeight.from_int8_rows(stored)
            native = name == head and implementation.startswith("cpu") and int8_head.can_run()
            return Int8Head(rows, None) if native else rows
        try:
            if name == "embed_tokens/embedding":
                return CodedRows.make(stored, tied, implementation)
            return make_kernel(stored, implementation)
        except NotImplementedError as error:
            platform, _ = IMPLEMENTATIONS.get(implementation, (None, ""))
            if platform not in (None, jax.default_backend()):
                raise  # no layer can run here
            raise NotImplementedError(f"{name.rpartition('/')[0]}: {error}") from None

    return leaf


def dense_params(source: ModelSource, dtype: str = "float32") -> Params:
    """The same tree with every weight in one float dtype; norms are float32.

    Args:
      source: any model; of a PackedCheckpoint, the weights that its packed ones stand for.
      dtype: float32, bfloat16 or float16.
    """

    def leaf(name: str, stored: np.ndarray | jax.Array) -> Any:
        return _dense_leaf(name, stored.astype(jnp.dtype(dtype)) if stored.ndim > 1 else stored)

    return _load(source.config, source.outer, source.block, leaf)


def outer_params(params: Params) -> Params:
    """The tree without its blocks: embedding, final norm, untied head."""
    return {name: part for name, part in params.items() if not name.startswith("layers_")}


def memory_bytes(params: Params) -> tuple[int, int]:
    """Bytes of the arrays of a parameter tree: (packed leaves, dense leaves)."""
    leaves = jax.tree.leaves(params, is_leaf=_is_weight)
    sizes = [(_is_packed(leaf), sum(a.nbytes for a in jax.tree.leaves(leaf))) for leaf in leaves]
    return sum(n for packed, n in sizes if packed), sum(n for packed, n in sizes if not packed)


def implementations(params: Params) -> list[str]:
    """Those of `ops.vq_matmul` that the packed layers of a tree run on, sorted."""
    leaves = jax.tree.leaves(params, is_leaf=_is_weight)
    kernels = [leaf.kernel if isinstance(leaf, CodedRows) else leaf for leaf in leaves]
    return sorted({leaf.implementation for leaf in kernels if isinstance(leaf, VQKernel)})


def float32_bytes(config: ModelConfig) -> int:
    """Bytes of the dense float32 model."""

    def values(shapes: Mapping[str, tuple[int, ...]]) -> int:
        return sum(int(np.prod(shape)) for shape in shapes.values())

    blocks = (count * values(block_shapes(of)) for of, count in config.block_counts().items())
    return 4 * (values(outer_shapes(config)) + sum(blocks))


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, (VQKernel, RowWeight, CodedRows))


def _is_packed(leaf: Any) -> bool:
    return _is_weight(leaf) and not (isinstance(leaf, RowWeight) and leaf.scale is None)


def _dense_leaf(name: str, array: np.ndarray) -> Any:
    if array.ndim == 1:
        return array
    by_rows = array.T if name.endswith("kernel") else array
    if isinstance(by_rows, jax.Array):  # of a block, on the device already
        return RowWeight(by_rows)
    return RowWeight(np.ascontiguousarray(by_rows))


def outer_on_device(tree: Mapping[str, Any], leaf: Leaf) -> Params:
    """What is outside the blocks."""
    return _part(tree, "", leaf)


def block_on_device(config: ModelConfig, index: int, tree: Mapping[str, Any], leaf: Leaf) -> Params:
    """A block, its experts stacked."""
    return stack_experts(config.of_block(index), _part(tree, f"layers_{index}/", leaf))


def _part(tree: Mapping[str, Any], within: str, leaf: Leaf) -> Params:
    flat = traverse_util.flatten_dict(tree, sep="/")
    leaves = {name: leaf(within + name, stored) for name, stored in flat.items()}
    # On a CPU, device_put may otherwise share, and keep alive, what the array is a view of.
    return jax.device_put(traverse_util.unflatten_dict(leaves, sep="/"), may_alias=False)


def _load(config: ModelConfig, outer, block, leaf: Leaf) -> Params:
    """Moves the model to the device part by part, so that the host holds one part at a time."""
    depth = config.num_hidden_layers
    blocks = {f"layers_{i}": block_on_device(config, i, block(i), leaf) for i in range(depth)}
    return outer_on_device(outer(), leaf) | blocks
