"""Nearest centroid search, the inner loop of EM, sweep and recode.

Cost: rows x K x (3 D + 3) flops and no memory traffic beyond points in, codes out: the comparison
runs over all points at once while K advances, so a points x K table is never formed.
"""

import jax
import jax.numpy as jnp
from jax import lax

_UNROLL = 16  # comparisons per loop step: compile time against loop overhead


def nearest(points: jax.Array, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Nearest centroid in Euclidean distance; the lowest index wins a tie.

    Args:
      points: (..., D, N).
      centroids: (..., K, D) with the same leading axes.

    Returns:
      codes (..., N) int32 and squared distances (..., N).
    """
    codes, distance = nearest_few(points, centroids, 1)
    return codes[0], distance[0]


def nearest_few(points: jax.Array, centroids: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` nearest centroids, nearest first; the lower index first where they tie.

    Args:
      points: (..., D, N).
      centroids: (..., K, D), K at least `count`; leading axes broadcast against those of points.
      count: static; each costs 5 more operations per point and centroid.

    Returns:
      codes (count, ..., N) int32 and squared distances (count, ..., N).
    """
    *lead, size, dim = centroids.shape
    if count > size:
        raise ValueError(f"there are {size} centroids, not {count=}")
    unroll = min(max(1, _UNROLL // count), size)
    steps = -(-size // unroll)
    pad = [(0, 0)] * len(lead) + [(0, steps * unroll - size), (0, 0)]
    # Infinity would turn into NaN against an infinite point; a distance this large never wins.
    padded = jnp.pad(centroids, pad, constant_values=1e18)
    chunks = jnp.moveaxis(padded, -2, 0).reshape(steps, unroll, *lead, dim)

    def compare(carry, chunk):
        best, codes, base = carry
        for k in range(unroll):
            distance = sum(
                jnp.square(points[..., d, :] - chunk[k, ..., d, None]) for d in range(dim)
            )
            code = jnp.broadcast_to(base + k, distance.shape)
            best, codes = _insert(best, codes, distance, code)
        return (best, codes, base + unroll), None

    shape = points.shape[:-2] + points.shape[-1:]
    start = (
        (jnp.full(shape, jnp.inf),) * count,
        (jnp.zeros(shape, jnp.int32),) * count,
        jnp.int32(0),
    )
    (best, codes, _), _ = lax.scan(compare, start, chunks)
    return jnp.stack(codes), jnp.stack(best)


def _insert(best, codes, distance, code):
    """Puts one more distance, with its code, into ascending tuples, whose last falls out."""
    new_best, new_codes = [], []
    for b, c in zip(best, codes, strict=True):
        closer = distance < b
        new_best.append(jnp.where(closer, distance, b))
        new_codes.append(jnp.where(closer, code, c))
        distance, code = jnp.where(closer, b, distance), jnp.where(closer, c, code)
    return tuple(new_best), tuple(new_codes)


def lookup(centroids: jax.Array, codes: jax.Array) -> jax.Array:
    """Centroids (..., K, D) at codes (..., N) -> (..., D, N)."""
    table = jnp.swapaxes(centroids, -1, -2)  # (..., D, K)
    return jnp.take_along_axis(table, codes[..., None, :], axis=-1, mode="promise_in_bounds")
