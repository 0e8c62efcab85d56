"""The C++ kernel with activations rounded to int8, one scale for each row of x."""

import jax

from gptvq_jax.core.vq_tensor import VQTensor
from gptvq_jax.ops.cpu import kernels
from gptvq_jax.ops.cpu.call import Call
from gptvq_jax.ops.reference import pack

__all__ = ["call", "check", "matmul", "pack"]


def check(tensor: VQTensor) -> None:
    """Raises NotImplementedError for what has no kernel with int8 activations."""
    reason = kernels.why_not_in_registers(tensor)
    if reason:
        raise NotImplementedError(reason)
    kernels.check(tensor)


def call(weight: VQTensor) -> Call:
    """The kernel for a packed weight."""
    return kernels.call(weight, round_x=True)


def matmul(x: jax.Array, weight: VQTensor) -> jax.Array:
    """x (N, C), weight of shape (R, C) -> (N, R) float32."""
    return call(weight)(x)
