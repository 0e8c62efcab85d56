"""A weight with a low-rank adapter beside it (LoRA, arXiv 2106.09685), as one leaf of the model.

    y = x W + s (x A^T) B^T

W stays as it is, packed or dense. For R outputs, C inputs and rank r the second term is r (R + C)
products a token, beside R C of the first.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraKernel:
    """Takes the place of a kernel (in, out): x @ leaf."""

    base: Any  # an array (in, out), or what implements x @ base
    a: jax.Array  # (rank, in)
    b: jax.Array  # (out, rank)
    scale: jax.Array  # (), float32

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        return self.a.shape[1], self.b.shape[0]

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """(..., in) -> (..., out) in the dtype of x.

        Raises:
          ValueError: x has another number of columns.
        """
        if x.shape[-1] != self.shape[0]:
            raise ValueError(f"x has {x.shape[-1]} columns, the adapter {self.shape[0]}")
        return times_base(x, self.base) + low_rank(x, self.a, self.b, self.scale)


def times_base(x: jax.Array, base: Any) -> jax.Array:
    """x @ base for an array (in, out) or a leaf, in the dtype of x."""
    if not isinstance(base, (jax.Array, np.ndarray)):
        return x @ base
    return _multiply(x, base).astype(x.dtype)


def low_rank(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """s (x A^T) B^T in the dtype of x, accumulated in float32."""
    inner = _multiply(x, a.T).astype(x.dtype)
    return (_multiply(inner, b.T) * scale).astype(x.dtype)


def _multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(
        x,
        kernel.astype(x.dtype),
        precision="highest" if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
