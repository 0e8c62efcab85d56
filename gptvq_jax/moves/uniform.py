"""Uniform grids as codebooks: what round-to-nearest and GPTQ place the weights on.

Centroid k of a group is scale * k + offset, or scale * (k - (K - 1) / 2) when symmetric: a rank-2
or rank-1 product, so a uniform tensor is stored as one with factored codebooks.
"""

import jax
import jax.numpy as jnp

from gptvq_jax.core.uniform_grid import basis
from gptvq_jax.core.vq_tensor import FactoredCodebook
from gptvq_jax.moves.compress import FLOAT16_STEP, spanning_scale
from gptvq_jax.moves.em import GroupData
from gptvq_jax.moves.sweep import Fit


def uniform_fit(size: int, symmetric: bool) -> Fit:
    """Grids that span the weights of each group; scale and offset are already float16 values."""

    def fit(data: GroupData, keys: jax.Array) -> jax.Array:
        del keys
        points, used = data.points[:, :, 0], data.weight > 0
        high = jnp.max(jnp.where(used, points, -jnp.inf), axis=(1, 2))
        low = jnp.min(jnp.where(used, points, jnp.inf), axis=(1, 2))
        if symmetric:
            high = jnp.maximum(jnp.abs(high), jnp.abs(low))
            low = -high
        # Equal weights in a group leave no range: all levels are the offset, or 0.
        scale = spanning_scale(jnp.where(high > low, (high - low) / (size - 1), 0.0))
        if symmetric:  # the level nearest to 0 is half a scale away from it
            scale = jnp.where(high < FLOAT16_STEP / 4, 0, scale)
        left = scale[:, None]
        if not symmetric:
            left = jnp.concatenate([left, low[:, None].astype(jnp.float16)], axis=1)
        left = left.astype(jnp.float32)
        return jnp.matmul(left, basis(size, symmetric), precision="highest")[..., None]

    return fit


def factored(centroids: jax.Array, symmetric: bool) -> FactoredCodebook:
    """The factors that `uniform_fit` multiplied; exact, since both are float16 values.

    Args:
      centroids: (M, S, G, K, 1).
    """
    size = centroids.shape[-2]
    first, last = centroids[..., 0, :], centroids[..., -1, :]
    scale = (last - first) / (size - 1)
    left = scale if symmetric else jnp.concatenate([scale, first], axis=-1)
    right = basis(size, symmetric)
    return FactoredCodebook(left.astype(jnp.float16), None, right.astype(jnp.float16))
