"""What is continuous in a stored weight once its codes are chosen: centroids, factors, scales.

A leaf of a block is a quantized tensor or, for a norm or a bias, an array in its stored dtype. Its
float32 parameters go in and out of it. `decode` rounds them as they will be stored, so a loss
of its result is that of the stored model; gradients pass the rounding as if it were the identity
(straight-through). Codes stay as they are, those of block scales too.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.core.vq_tensor import DenseCodebook, FactoredCodebook, VQTensor, dequantize
from gptvq_jax.moves.compress import quantize_centroids, quantize_factors

Leaf = QuantizedTensor | jax.Array
Parameters = dict[str, jax.Array]
_OF_TRELLIS = ("row_scales", "col_scales", "levels", "outlier_values")
CODEBOOKS = ("centroids", "left", "right", "levels")  # names of parameters; others are scales,
VALUES = "values"  # but for those of arrays


class Unpacked(NamedTuple):
    """A leaf as `decode` reads it: nothing is cut out of bytes any more.

    Attributes:
      leaf: without codes; of trellis codes, with as many outliers as `for_compilation` gives it.
      codes: what `small_codes` of the tensor gives, or None.
      outliers: rows and columns (N,) int32, beyond the last row those that are no outliers; or
        None.
    """

    leaf: Leaf
    codes: jax.Array | None = None
    outliers: tuple[jax.Array, jax.Array] | None = None


def unpack(leaf: Leaf) -> Unpacked:
    """The codes cut out once, for many calls of `decode`: a byte or two for each."""
    if not isinstance(leaf, QuantizedTensor):
        return Unpacked(jnp.asarray(leaf))
    count = 0
    if isinstance(leaf, TrellisTensor) and leaf.outlier_values is not None:
        count = len(leaf.outlier_values)
    return _unpack(leaf.for_compilation(), count)


@jax.jit
def _unpack(leaf: QuantizedTensor, count: jax.Array) -> Unpacked:
    """The same of what `for_compilation` gave, of which `count` outliers are some."""
    codes = leaf.small_codes()
    bare = dataclasses.replace(leaf, codes=jnp.zeros(0, jnp.uint8))
    if not isinstance(leaf, TrellisTensor):
        return Unpacked(bare, codes)
    rows, cols = leaf.outlier_positions()
    rows = jnp.where(jnp.arange(len(rows)) < count, rows, leaf.rows)
    return Unpacked(dataclasses.replace(bare, outlier_gaps=None), codes, (rows, cols))


def parameters(leaf: Leaf) -> Parameters:
    """The float32 values of a leaf that gradients can change.

    Returns:
      {"centroids": (M, S, G, K, D)} or, of factored codebooks, {"left": (M, S, G, p), "right":
      (p, K)}, scales multiplied in; with "row_scales": (R,) and, of blocks, "block_offset" and
      "block_step" (S,) where the tensor has them. Of trellis codes, {"row_scales", "col_scales"}
      and, where it has them, {"levels", "outlier_values"}. Of an array, {"values"} in its shape.
    """
    if isinstance(leaf, TrellisTensor):
        stored = {name: getattr(leaf, name) for name in _OF_TRELLIS}
        return {n: jnp.asarray(v, jnp.float32) for n, v in stored.items() if v is not None}
    if not isinstance(leaf, VQTensor):
        return {VALUES: jnp.asarray(leaf, jnp.float32)}
    codebook = leaf.codebook
    if isinstance(codebook, DenseCodebook):
        params = {"centroids": codebook.values()}
    else:
        left = jnp.asarray(codebook.left, jnp.float32)
        if codebook.left_scale is not None:
            left = left * jnp.asarray(codebook.left_scale, jnp.float32)
        params = {"left": left, "right": jnp.asarray(codebook.right, jnp.float32)}
    if leaf.row_scales is not None:
        params["row_scales"] = jnp.asarray(leaf.row_scales, jnp.float32)
    if leaf.block_scales is not None:
        params["block_offset"] = jnp.asarray(leaf.block_scales.offset, jnp.float32)
        params["block_step"] = jnp.asarray(leaf.block_scales.step, jnp.float32)
    return params


def with_codes(leaf: Leaf, rounded: Leaf) -> Leaf:
    """What `unpack` of a leaf has become (`with_parameters` of its `leaf`), with codes again."""
    if isinstance(leaf, TrellisTensor):
        found = {name: getattr(rounded, name) for name in _OF_TRELLIS}
        added = leaf.outlier_values
        found["outlier_values"] = None if added is None else rounded.outlier_values[: len(added)]
        return dataclasses.replace(leaf, **found)
    if not isinstance(leaf, VQTensor):
        return rounded
    return dataclasses.replace(rounded, codes=leaf.codes)


def with_parameters(leaf: Leaf, params: Parameters) -> Leaf:
    """The leaf with other parameters, rounded as it stores them.

    The scales of int8 and int4 codebooks follow their largest entries. A leaf as the methods make
    it gets its own bytes back from its own parameters.
    """
    if isinstance(leaf, TrellisTensor):
        stored = {name: value.astype(jnp.float16) for name, value in params.items()}
        return dataclasses.replace(leaf, **stored)
    if not isinstance(leaf, VQTensor):
        return params[VALUES].astype(leaf.dtype)
    old = leaf.codebook
    if isinstance(old, DenseCodebook):
        codebook = quantize_centroids(params["centroids"], old.bits)
    else:
        bits = 16 if old.left_scale is None else 8
        codebook = quantize_factors(params["left"], params["right"], bits)
    rows, blocks = leaf.row_scales, leaf.block_scales
    if rows is not None:
        rows = params["row_scales"].astype(jnp.float16)
    if blocks is not None:
        offset, step = (params[f"block_{n}"].astype(jnp.float16) for n in ("offset", "step"))
        blocks = dataclasses.replace(blocks, offset=offset, step=step)
    return dataclasses.replace(leaf, codebook=codebook, row_scales=rows, block_scales=blocks)


def decode(unpacked: Unpacked, params: Parameters) -> jax.Array:
    """What `with_parameters(leaf, params)` stands for, float32, differentiable in `params`.

    Of a quantized tensor that is its `dequantize`, (R, C). The gradient is that of the same
    function without rounding, at the rounded values. It costs R C / D lookups of a centroid for
    each codebook, and on the way back as many additions to one.
    """
    leaf = unpacked.leaf
    rounded = parameters(with_parameters(leaf, params))
    values = {name: straight_through(params[name], rounded[name]) for name in rounded}
    if isinstance(leaf, TrellisTensor):
        exact = dataclasses.replace(leaf, **values)
        return exact.dequantize(unpacked.codes, unpacked.outliers)
    if not isinstance(leaf, VQTensor):
        return values[VALUES]
    if isinstance(leaf.codebook, DenseCodebook):
        centroids = values["centroids"]
        codebook = DenseCodebook(centroids, None, 16, *centroids.shape[-2:])
    else:
        codebook = FactoredCodebook(values["left"], None, values["right"])
    blocks = leaf.block_scales
    if blocks is not None:
        offset, step = values["block_offset"], values["block_step"]
        blocks = dataclasses.replace(blocks, offset=offset, step=step)
    scales = values.get("row_scales")
    exact = dataclasses.replace(leaf, codebook=codebook, row_scales=scales, block_scales=blocks)
    return dequantize(exact, unpacked.codes)


@jax.custom_jvp
def straight_through(value: jax.Array, rounded: jax.Array) -> jax.Array:
    """`rounded`, with the derivative of `value`."""
    del value
    return rounded


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return primals[1], tangents[0]
