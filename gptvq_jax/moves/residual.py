"""What is left of a weight once it is quantized, and its image under the Hessian.

With E = W - Q the loss is L(Q) = tr(E^T H E) in the transposed layout, and -2 H E its gradient. H E
costs 2 R C^2 flops; a move that knows it need not form it again, and hands on what it has become.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Residual(NamedTuple):
    """Arrays in the transposed, padded layout of grid.py."""

    error: jax.Array  # (S * c, G * r) E = W - Q
    image: jax.Array  # (S * c, G * r) H E

    @property
    def loss(self) -> jax.Array:
        """L(Q) of the rows here, ()."""
        return jnp.vdot(self.error, self.image, precision="highest")

    def moved(self, change: jax.Array, hessian: jax.Array) -> "Residual":
        """Of Q + change; costs 2 R C^2."""
        return Residual(self.error - change, self.image - image_of(hessian, change))


def residual_of(weight: jax.Array, quantized: jax.Array, hessian: jax.Array) -> Residual:
    """Of Q; weight and quantized are (S * c, G * r), hessian (S * c, S * c). Costs 2 R C^2."""
    error = weight - quantized
    return Residual(error, image_of(hessian, error))


def image_of(hessian: jax.Array, error: jax.Array) -> jax.Array:
    """H E."""
    return jnp.matmul(hessian, error, precision="highest")
