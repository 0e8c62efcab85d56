"""Weights too large for the code of their column: kept beside it, at 32 bits each."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_ROUNDS = 4  # after which the sets that scales and outliers make of each other hardly change


class Aside(NamedTuple):
    """A weight (R, C) without its outliers."""

    row_scales: jax.Array  # (R,) float16: root mean squares of what is left; 1 of a row of zeros
    outliers: jax.Array  # (R, C) bool


def set_aside(weight: jax.Array, limit: float | jax.Array) -> Aside:
    """Outliers, beyond `limit` standard deviations of their row and column; 0: there are none.

    A weight that stands out makes its whole row and column coarse. Row scales are those of the
    weights that stay, and a column's deviation is taken after them.
    """

    def scales(mask):
        square = jnp.where(mask, 0.0, jnp.square(weight))
        count = jnp.maximum(jnp.sum(~mask, axis=1), 1)
        scale = jnp.sqrt(jnp.sum(square, axis=1) / count)
        # As stored: a row of zeros, or one too small for float16, divides nothing.
        stored = scale.astype(jnp.float16)
        return jnp.where(stored > 0, stored, jnp.float16(1))

    def again(_, mask):
        unit = weight / scales(mask).astype(jnp.float32)[:, None]
        square = jnp.where(mask, 0.0, jnp.square(unit))
        count = jnp.maximum(jnp.sum(~mask, axis=0), 1)
        return jnp.abs(unit) > limit * jnp.sqrt(jnp.sum(square, axis=0) / count)

    none = jnp.zeros(weight.shape, bool)
    mask = lax.fori_loop(0, _ROUNDS, again, none) & (limit > 0)
    return Aside(scales(mask), mask)
