"""What vector quantization is compared with: 4-bit integers, symmetric, groups of 128 inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.ops.cpu.kernels import INT4_GROUP_SIZE as GROUP_SIZE
from gptvq_jax.ops.cpu.kernels import int4_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4Kernel:
    """weight[r, c] = scale[r, c / 128] * (code - 8), used as x @ kernel; 4.125 bits per value.

    On a CPU the product is our C++ kernel, which rounds x to int8 with one scale per row;
    elsewhere plain jnp, fused by the compiler.
    """

    codes: jax.Array  # (R, C / 2) uint8, the code of an even column in the low bits
    scale: jax.Array  # (R, C / 128) float16

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """(N, C) -> (N, R) in the dtype of x."""
        if jax.default_backend() == "cpu":
            return int4_matmul(x.astype(jnp.float32), self.codes, self.scale).astype(x.dtype)
        weight = self.dequantize()
        if x.shape[0] == 1:
            return jnp.sum(weight * x.astype(jnp.float32), axis=-1)[None].astype(x.dtype)
        return jnp.matmul(x, weight.astype(x.dtype).T)

    def dequantize(self) -> jax.Array:
        """The weight (R, C), float32."""
        rows, groups = self.scale.shape
        codes = jnp.stack([self.codes & 15, self.codes >> 4], axis=-1)
        codes = codes.reshape(rows, groups, GROUP_SIZE).astype(jnp.float32) - 8
        return (codes * self.scale[..., None].astype(jnp.float32)).reshape(rows, -1)


def random_int4(rows: int, cols: int, seed: int = 0) -> Int4Kernel:
    """Random codes, weights of the size of a real layer's, about 0.02.

    Raises:
      ValueError: cols is not a multiple of 128.
    """
    if cols % GROUP_SIZE:
        raise ValueError(f"{cols=} must be a multiple of {GROUP_SIZE}")
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (rows, cols // 2), np.uint8)
    scale = rng.uniform(0.003, 0.005, (rows, cols // GROUP_SIZE)).astype(np.float16)
    return Int4Kernel(codes, scale)
