"""Hessian-weighted EM: a k-means whose distance is the layer's output error (GPTVQ, section 3.2).

The loss of a group is sum_n weight_n |(x_n - c_code(n)) T_j(n)|^2, where T_j = U_jj^-1 comes from
the Cholesky factor of the inverse Hessian: D x D and shared by all rows of vector position j.
Both steps are exact minimisations, so the loss never rises.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.moves.nearest import nearest


class GroupData(NamedTuple):
    """The vectors that share codebooks: G groups of J positions x r rows."""

    points: jax.Array  # (G, J, D, r)
    whiten: jax.Array  # (J, D, D): T_j; the metric is |(x - c) T_j|^2, x and c as row vectors
    weight: jax.Array  # (G, J, r): s^2 of scaled points, 0 for padding


def whitened(data: GroupData, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Points (G, J, D, r) and centroids (G, J, K, D) in the space where the metric is Euclidean."""
    points = jnp.einsum("gjdr,jde->gjer", data.points, data.whiten, precision="highest")
    return points, jnp.einsum("gkd,jde->gjke", centroids, data.whiten, precision="highest")


def assign(data: GroupData, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """E-step: codes (G, J, r) and the loss per group (G,)."""
    codes, distance = nearest(*whitened(data, centroids))
    return codes, jnp.sum(data.weight * distance, axis=(1, 2))


def update(data: GroupData, codes: jax.Array, centroids: jax.Array) -> jax.Array:
    """M-step: each centroid solves (sum_n A_n) c = sum_n A_n x_n, A_n = weight_n T_j T_j^T.

    Centroids that own no weight stay where they are.
    """
    groups, positions, dim, _ = data.points.shape
    size = centroids.shape[1]
    cells = groups * positions * size
    base = (jnp.arange(groups * positions) * size).reshape(groups, positions, 1)
    cell = (base + codes).reshape(-1)

    def total(values):  # (G, J, r) -> sum over the rows of each (group, position, code)
        sums = jax.ops.segment_sum(values.reshape(-1), cell, cells)
        return sums.reshape(groups, positions, size)

    mass = total(data.weight)
    first = jnp.stack([total(data.weight * data.points[:, :, d]) for d in range(dim)], axis=-1)
    metric = jnp.einsum("jde,jfe->jdf", data.whiten, data.whiten, precision="highest")
    left = jnp.einsum("gjk,jdf->gkdf", mass, metric, precision="highest")
    right = jnp.einsum("gjkd,jdf->gkf", first, metric, precision="highest")
    # A relative ridge towards the old centroid keeps rank-deficient sums solvable; an empty
    # centroid has left = right = 0 and therefore stays.
    trace = jnp.trace(left, axis1=-2, axis2=-1)[..., None, None]
    ridge = (1e-6 * trace / dim + (trace == 0)) * jnp.eye(dim)
    step = jnp.linalg.solve(
        left + ridge, (right - jnp.einsum("gkdf,gkd->gkf", left, centroids))[..., None]
    )
    return centroids + step[..., 0]


def em(data: GroupData, centroids: jax.Array, iterations: int) -> jax.Array:
    """Alternates `assign` and `update`.

    Args:
      data: vectors of G groups.
      centroids: (G, K, D) seeds.
      iterations: number of alternations, at least 0.

    Returns:
      Centroids (G, K, D).
    """

    def step(_, centroids):
        codes, _ = assign(data, centroids)
        return update(data, codes, centroids)

    return lax.fori_loop(0, iterations, step, centroids)
