"""x W^T in float32 by the definition: dequantize, then multiply."""

import jax
import jax.numpy as jnp

from gptvq_jax.core.quantized_tensor import QuantizedTensor

KINDS = (QuantizedTensor,)  # what it takes; of a module that does not say, VQTensor alone


def check(tensor: QuantizedTensor) -> None:
    """Supports every tensor."""


def pack(tensor: QuantizedTensor) -> QuantizedTensor:
    """Reads the stored form itself."""
    return tensor


def matmul(x: jax.Array, weight: QuantizedTensor) -> jax.Array:
    """x (N, C), weight of shape (R, C) -> (N, R) float32."""
    x = x.astype(jnp.float32)
    return jnp.matmul(x, weight.dequantize().T, precision="highest")
