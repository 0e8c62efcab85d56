"""The C++ kernel with float32 activations."""

import jax

from gptvq_jax.ops.cpu import kernels
from gptvq_jax.ops.cpu.kernels import check
from gptvq_jax.ops.reference import pack

__all__ = ["check", "matmul", "pack"]


def matmul(x: jax.Array, weight) -> jax.Array:
    """x (N, C), weight of shape (R, C) -> (N, R) float32."""
    return kernels.matmul(x, weight, round_x=False)
