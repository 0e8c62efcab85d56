"""Nearest centroid search, the inner loop of EM, sweep and recode.

Cost: rows x K x (3 D + 3) flops and no memory traffic beyond points in, codes out: the comparison
runs over all points at once while K advances, so a points x K table is never formed.
"""

import jax
import jax.numpy as jnp
from jax import lax

_UNROLL = 16  # centroids compared per loop step: compile time against loop overhead


def nearest(points: jax.Array, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Nearest centroid in Euclidean distance; the lowest index wins a tie.

    Args:
      points: (..., D, N).
      centroids: (..., K, D) with the same leading axes.

    Returns:
      codes (..., N) int32 and squared distances (..., N).
    """
    *lead, dim, _ = points.shape
    size = centroids.shape[-2]
    unroll = min(_UNROLL, size)
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
            closer = distance < best
            best = jnp.where(closer, distance, best)
            codes = jnp.where(closer, base + k, codes)
        return (best, codes, base + unroll), None

    shape = points.shape[:-2] + points.shape[-1:]
    start = (jnp.full(shape, jnp.inf), jnp.zeros(shape, jnp.int32), jnp.int32(0))
    (best, codes, _), _ = lax.scan(compare, start, chunks)
    return codes, best


def lookup(centroids: jax.Array, codes: jax.Array) -> jax.Array:
    """Centroids (..., K, D) at codes (..., N) -> (..., D, N)."""
    table = jnp.swapaxes(centroids, -1, -2)  # (..., D, K)
    return jnp.take_along_axis(table, codes[..., None, :], axis=-1, mode="promise_in_bounds")
