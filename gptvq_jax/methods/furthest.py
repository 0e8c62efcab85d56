"""Which vectors a gradient moves furthest, how far that is, and how many of them may change."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Furthest(NamedTuple):
    """Of squared moves, the largest, in order.

    Attributes:
      places: (n,) of the moves one behind the other, the largest first, then the first of equals.
      chosen: bool, in the shape of the moves: those that count. A move of 0 does not.
    """

    places: jax.Array
    chosen: jax.Array


def furthest(square: jax.Array, count: jax.Array, most: int) -> Furthest:
    """The `count` largest of squared moves, of any shape.

    Args:
      square: of the moves.
      count: at most `most`; programs do not depend on it.
      most: places that are given.
    """
    values, places = jax.lax.top_k(square.reshape(-1), most)
    first = (jnp.arange(most) < count) & (values > 0)
    return Furthest(places, _in_place(places, first, square.shape))


def trusted(found: Furthest, change: jax.Array, most: jax.Array) -> jax.Array:
    """Which of the furthest moves may change a weight: bool, in the shape of `change`.

    Args:
      found: the moves.
      change: squared change of the weight that each of them leads to; 0 but for those.
      most: of the sum of these; the one that goes beyond it is the last.
    """
    in_order = change.reshape(-1)[found.places]
    before = jnp.cumsum(in_order) - in_order
    return _in_place(found.places, before < most, change.shape)


def step_size(square: jax.Array, chosen: jax.Array, size: jax.Array, rate: float) -> jax.Array:
    """With which the root mean square of the moves that are chosen is `rate` times that of vectors.

    Args:
      square: squared moves per unit of it.
      chosen: bool, in the same shape.
      size: mean square of a vector.
      rate: see above.
    """
    mean = jnp.sum(jnp.where(chosen, square, 0.0)) / jnp.maximum(jnp.sum(chosen), 1)
    return rate * jnp.sqrt(size / or_one(mean))


def or_one(size: jax.Array) -> jax.Array:
    """What to divide by where a size may be 0."""
    return jnp.where(size > 0, size, 1.0)


def _in_place(places: jax.Array, values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    size = 1
    for length in shape:
        size *= length
    return jnp.zeros(size, bool).at[places].set(values).reshape(shape)
