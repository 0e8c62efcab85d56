"""The C++ kernels with activations rounded to int8.

One scale for each row of x; with trellis codes, one for every 64 columns of it.
"""

import jax

from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.core.vq_tensor import VQTensor
from gptvq_jax.ops.cpu import kernels, trellis
from gptvq_jax.ops.cpu.call import Call
from gptvq_jax.ops.cpu.trellis import PackedTrellis

KINDS = (VQTensor, TrellisTensor)


def check(tensor: QuantizedTensor) -> None:
    """Raises NotImplementedError for what has no kernel with int8 activations."""
    if isinstance(tensor, TrellisTensor):
        return trellis.check(tensor)
    reason = kernels.why_not_in_registers(tensor)
    if reason:
        raise NotImplementedError(reason)
    kernels.check(tensor)


def pack(tensor: QuantizedTensor) -> VQTensor | PackedTrellis:
    """Codebooks are read as they are stored."""
    return trellis.pack(tensor, int8=True) if isinstance(tensor, TrellisTensor) else tensor


def call(weight: VQTensor | PackedTrellis) -> Call:
    """The kernel for a packed weight."""
    if isinstance(weight, PackedTrellis):
        return trellis.call(weight)
    return kernels.call(weight, round_x=True)


def matmul(x: jax.Array, weight: VQTensor | PackedTrellis) -> jax.Array:
    """x (N, C), weight of shape (R, C) -> (N, R) float32."""
    return call(weight)(x)
