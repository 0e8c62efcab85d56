"""x W^T in plain jnp, left to the compiler to fuse.

With few rows of x the product is a sum over columns of decoded weight times x, which XLA makes one
kernel on a GPU: no decoded weight reaches memory. With many rows the weight is decoded once, in the
dtype of x, and multiplied.
"""

import jax
import jax.numpy as jnp

from gptvq_jax.core.quantized_tensor import QuantizedTensor

KINDS = (QuantizedTensor,)
_FUSED_ROWS = 2  # of x, up to which decoding again for each row is cheaper than storing the weight


def check(tensor: QuantizedTensor) -> None:
    """Supports every tensor."""


def pack(tensor: QuantizedTensor) -> QuantizedTensor:
    """Reads the stored form itself."""
    return tensor


def matmul(x: jax.Array, weight: QuantizedTensor) -> jax.Array:
    """x (N, C), weight of shape (R, C) -> (N, R) float32."""
    if x.shape[0] <= _FUSED_ROWS:
        decoded = weight.dequantize()
        rows = [jnp.sum(decoded * row.astype(jnp.float32), axis=-1) for row in x]
        return jnp.stack(rows) if rows else jnp.zeros((0, weight.shape[0]), jnp.float32)
    precision = "highest" if x.dtype == jnp.float32 else None
    return jnp.matmul(
        x,
        weight.dequantize().astype(x.dtype).T,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
