"""The C++ kernels with float32 activations."""

import jax

from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.core.vq_tensor import VQTensor
from gptvq_jax.ops.cpu import kernels, trellis
from gptvq_jax.ops.cpu.call import Call
from gptvq_jax.ops.cpu.trellis import PackedTrellis

KINDS = (VQTensor, TrellisTensor)


def check(tensor: QuantizedTensor) -> None:
    """Raises NotImplementedError for what the kernels cannot read, or if they cannot be built."""
    if isinstance(tensor, TrellisTensor):
        trellis.check(tensor)
    else:
        kernels.check(tensor)


def pack(tensor: QuantizedTensor) -> VQTensor | PackedTrellis:
    """Codebooks are read as they are stored."""
    return trellis.pack(tensor, int8=False) if isinstance(tensor, TrellisTensor) else tensor


def call(weight: VQTensor | PackedTrellis) -> Call:
    """The kernel for a packed weight."""
    if isinstance(weight, PackedTrellis):
        return trellis.call(weight)
    return kernels.call(weight, round_x=False)


def matmul(x: jax.Array, weight: VQTensor | PackedTrellis) -> jax.Array:
    """x (N, C), weight of shape (R, C) -> (N, R) float32."""
    return call(weight)(x)
