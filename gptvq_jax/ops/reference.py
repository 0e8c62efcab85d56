"""x W^T in float32 by the definition: dequantize, then multiply."""

import jax
import jax.numpy as jnp

from gptvq_jax.core.vq_tensor import VQTensor, dequantize


def check(tensor: VQTensor) -> None:
    """Supports every tensor."""


def pack(tensor: VQTensor) -> VQTensor:
    """Reads the stored form itself."""
    return tensor


def matmul(x: jax.Array, weight: VQTensor) -> jax.Array:
    """x (N, C), weight of shape (R, C) -> (N, R) float32."""
    x = x.astype(jnp.float32)
    return jnp.matmul(x, dequantize(weight).T, precision="highest")
