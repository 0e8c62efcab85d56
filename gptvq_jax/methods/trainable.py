"""What is continuous in a stored weight once its codes are chosen: centroids, factors, scales.

A leaf of a block is a quantized tensor or, for the scale of a norm, an array in its stored dtype.
Its float32 parameters go in and out of it. `decode` rounds them as they will be stored, so a loss
of its result is that of the stored model; gradients pass the rounding as if it were the identity
(straight-through). Codes stay as they are, and so do block scales, which are codes too.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.core.vq_tensor import DenseCodebook, FactoredCodebook, VQTensor, dequantize
from gptvq_jax.moves.compress import quantize_centroids, quantize_factors

Leaf = QuantizedTensor | jax.Array
Parameters = dict[str, jax.Array]
_OF_TRELLIS = ("row_scales", "col_scales", "levels", "outlier_values")


def parameters(leaf: Leaf) -> Parameters:
    """The float32 values of a leaf that gradients can change.

    Returns:
      {"centroids": (M, S, G, K, D)} or, of factored codebooks, {"left": (M, S, G, p), "right":
      (p, K)}, scales multiplied in; with "row_scales": (R,) where the tensor has them. Of trellis
      codes, {"row_scales", "col_scales"} and, where it has them, {"levels", "outlier_values"}. Of
      an array, {"values"} in its shape.
    """
    if isinstance(leaf, TrellisTensor):
        stored = {name: getattr(leaf, name) for name in _OF_TRELLIS}
        return {n: jnp.asarray(v, jnp.float32) for n, v in stored.items() if v is not None}
    if not isinstance(leaf, VQTensor):
        return {"values": jnp.asarray(leaf, jnp.float32)}
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
    return params


def with_parameters(leaf: Leaf, params: Parameters) -> Leaf:
    """The leaf with other parameters, rounded as it stores them.

    The scales of int8 and int4 codebooks follow their largest entries. A leaf as the methods make
    it gets its own bytes back from its own parameters.
    """
    if isinstance(leaf, TrellisTensor):
        stored = {name: value.astype(jnp.float16) for name, value in params.items()}
        return dataclasses.replace(leaf, **stored)
    if not isinstance(leaf, VQTensor):
        return params["values"].astype(leaf.dtype)
    old = leaf.codebook
    if isinstance(old, DenseCodebook):
        codebook = quantize_centroids(params["centroids"], old.bits)
    else:
        bits = 16 if old.left_scale is None else 8
        codebook = quantize_factors(params["left"], params["right"], bits)
    scales = leaf.row_scales
    if scales is not None:
        scales = params["row_scales"].astype(jnp.float16)
    return dataclasses.replace(leaf, codebook=codebook, row_scales=scales)


def decode(leaf: Leaf, params: Parameters) -> jax.Array:
    """What `with_parameters(leaf, params)` stands for, float32, differentiable in `params`.

    Of a quantized tensor that is its `dequantize`, (R, C). The gradient is that of the same
    function without rounding, at the rounded values. It costs R C / D lookups of a centroid for
    each codebook, and on the way back as many additions to one.
    """
    rounded = parameters(with_parameters(leaf, params))
    values = {name: straight_through(params[name], rounded[name]) for name in rounded}
    if isinstance(leaf, TrellisTensor):
        return dataclasses.replace(leaf, **values).dequantize()
    if not isinstance(leaf, VQTensor):
        return values["values"]
    if isinstance(leaf.codebook, DenseCodebook):
        centroids = values["centroids"]
        codebook = DenseCodebook(centroids, None, 16, *centroids.shape[-2:])
    else:
        codebook = FactoredCodebook(values["left"], None, values["right"])
    scales = values.get("row_scales")
    return dequantize(dataclasses.replace(leaf, codebook=codebook, row_scales=scales))


@jax.custom_jvp
def straight_through(value: jax.Array, rounded: jax.Array) -> jax.Array:
    """`rounded`, with the derivative of `value`."""
    del value
    return rounded


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return primals[1], tangents[0]
