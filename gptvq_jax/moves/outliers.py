"""Weights too large for the code of their column: kept beside it, at 32 bits each."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.core.trellis_table import gaussian_values
from gptvq_jax.moves.excess import distortion, spread

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

    def again(_, mask):
        return deviations(weight, without(weight, mask)) > limit

    none = jnp.zeros(weight.shape, bool)
    return without(weight, lax.fori_loop(0, _ROUNDS, again, none) & (limit > 0))


def without(weight: jax.Array, outliers: jax.Array) -> Aside:
    """The weight without outliers (R, C) that are known."""
    square = jnp.where(outliers, 0.0, jnp.square(weight))
    count = jnp.maximum(jnp.sum(~outliers, axis=1), 1)
    # As stored: a row of zeros, or one too small for float16, divides nothing.
    stored = jnp.sqrt(jnp.sum(square, axis=1) / count).astype(jnp.float16)
    return Aside(jnp.where(stored > 0, stored, jnp.float16(1)), outliers)


def deviations(weight: jax.Array, aside: Aside) -> jax.Array:
    """Of every weight (R, C): how many standard deviations of its row and column it has."""
    unit = weight / aside.row_scales.astype(jnp.float32)[:, None]
    square = jnp.where(aside.outliers, 0.0, jnp.square(unit))
    count = jnp.maximum(jnp.sum(~aside.outliers, axis=0), 1)
    deviation = jnp.sqrt(jnp.sum(square, axis=0) / count)
    return jnp.abs(unit) / jnp.where(deviation > 0, deviation, 1e-30)


def loss_if_coded(
    weight: jax.Array, aside: Aside, metric: jax.Array, rates: jax.Array, window_bits: int
) -> jax.Array:
    """What each weight (R, C) adds to the loss if its column's code has to hold it.

    What lies beyond the reach of the table at the column's scale is lost; within it a weight costs
    its square times D(K), as if it were part of the Gaussian, and beyond less, because the scale
    does not follow (a fit to what searches lose). In a column of no bits it is lost as a whole.

    Args:
      aside: outliers without which rows and columns are as wide as they are.
      metric: (C,) of a squared error of each column: 1 / U_jj^2.
      rates: K (C,).
      window_bits: L.
    """
    factor = jnp.asarray(distortion(window_bits), jnp.float32)[rates]
    reach = gaussian_values(window_bits).max() / jnp.asarray(spread(window_bits))[rates]
    reach = jnp.where(rates > 0, reach, jnp.inf)
    within = jnp.minimum(1.0, reach / jnp.maximum(deviations(weight, aside), 1e-30))
    return jnp.square(weight) * (factor * within + jnp.square(1 - within)) * metric
