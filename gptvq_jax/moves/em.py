"""Hessian-weighted EM: a k-means whose distance is the layer's output error (GPTVQ, section 3.2).

The loss of a group is sum_n weight_n |(x_n - c_code(n)) T_j(n)|^2, where T_j = U_jj^-1 comes from
the Cholesky factor of the inverse Hessian: D x D and shared by all rows of vector position j.
Both steps are exact minimisations, so the loss never rises. Vector positions go in chunks: with
65,536 centroids, a table of all positions and centroids would be larger than the layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.core.row_axis import ALL_HERE, RowAxis
from gptvq_jax.moves.nearest import nearest

_CHUNK_CELLS = 2**21  # positions x centroids with tables of their own at once


class GroupData(NamedTuple):
    """The vectors that share codebooks: G groups of J positions x r rows."""

    points: jax.Array  # (G, J, D, r)
    whiten: jax.Array  # (J, D, D): T_j; the metric is |(x - c) T_j|^2, x and c as row vectors
    weight: jax.Array  # (G, J, r): s^2 of scaled points, 0 for padding


def whitened(data: GroupData, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Points (G, J, D, r) and centroids (G, J, K, D) in the space where the metric is Euclidean."""
    points = jnp.einsum("gjdr,jde->gjer", data.points, data.whiten, precision="highest")
    return points, jnp.einsum("gkd,jde->gjke", centroids, data.whiten, precision="highest")


def assign(
    data: GroupData, centroids: jax.Array, axis: RowAxis = ALL_HERE
) -> tuple[jax.Array, jax.Array]:
    """E-step: codes (G, J, r) and the loss per group (G,); `axis` is as in `em`."""

    def of_chunk(chunk):
        codes, distance = nearest(*whitened(chunk, centroids))
        return codes, jnp.sum(chunk.weight * distance, axis=(1, 2))

    codes, loss = lax.map(of_chunk, _chunks(data, centroids))  # (chunks, G, J / chunks, r)
    return jnp.moveaxis(codes, 0, 1).reshape(data.weight.shape), axis.sum(jnp.sum(loss, axis=0))


def update(
    data: GroupData, codes: jax.Array, centroids: jax.Array, axis: RowAxis = ALL_HERE
) -> jax.Array:
    """M-step: each centroid solves (sum_n A_n) c = sum_n A_n x_n, A_n = weight_n T_j T_j^T.

    Centroids that own no weight stay where they are; `axis` is as in `em`.
    """
    size, dim = centroids.shape[1:]

    def add_chunk(sums, chunk):
        data, codes = chunk
        groups, positions = codes.shape[:2]
        cells = groups * positions * size
        base = (jnp.arange(groups * positions) * size).reshape(groups, positions, 1)
        cell = (base + codes).reshape(-1)

        def total(values):  # (G, J, r) -> sum over the rows of each (group, position, code)
            per_cell = jax.ops.segment_sum(values.reshape(-1), cell, cells)
            return per_cell.reshape(groups, positions, size)

        mass = total(data.weight)
        first = jnp.stack([total(data.weight * data.points[:, :, d]) for d in range(dim)], axis=-1)
        metric = jnp.einsum("jde,jfe->jdf", data.whiten, data.whiten, precision="highest")
        left = jnp.einsum("gjk,jdf->gkdf", mass, metric, precision="highest")
        right = jnp.einsum("gjkd,jdf->gkf", first, metric, precision="highest")
        return jax.tree.map(jnp.add, sums, (left, right)), None

    zeros = jnp.zeros((*centroids.shape, dim)), jnp.zeros_like(centroids)
    chunks = _chunks(data, centroids)
    codes = _cut(codes, len(chunks.whiten), 1)
    (left, right), _ = lax.scan(add_chunk, zeros, (chunks, codes))
    left, right = axis.sum((left, right))
    # A relative ridge towards the old centroid keeps rank-deficient sums solvable; an empty
    # centroid has left = right = 0 and therefore stays.
    trace = jnp.trace(left, axis1=-2, axis2=-1)[..., None, None]
    ridge = (1e-6 * trace / dim + (trace == 0)) * jnp.eye(dim)
    missing = right - jnp.einsum("gkdf,gkd->gkf", left, centroids, precision="highest")
    return centroids + _solve(left + ridge, missing)


def _solve(matrices: jax.Array, vectors: jax.Array) -> jax.Array:
    """x of A x = b for small positive definite A (..., D, D), b (..., D), by elimination.

    LAPACK shares thousands of matrices out to the threads of XLA, and waits for them: of two layers
    at once on two cores, each may wait for ever for the other's.
    """
    rows = jnp.concatenate([matrices, vectors[..., None]], axis=-1)
    for k in range(vectors.shape[-1]):
        pivot = rows[..., k, :] / rows[..., k, k, None]
        rows = (rows - rows[..., k, None] * pivot[..., None, :]).at[..., k, :].set(pivot)
    return rows[..., -1]


def _chunks(data: GroupData, centroids: jax.Array) -> GroupData:
    """The data of equally many positions each, stacked along a new first axis."""
    positions, cells = len(data.whiten), centroids.shape[0] * centroids.shape[1]
    count = next(
        n
        for n in range(1, positions + 1)
        if positions % n == 0 and (positions // n * cells <= _CHUNK_CELLS or n == positions)
    )
    return GroupData(
        _cut(data.points, count, 1), _cut(data.whiten, count, 0), _cut(data.weight, count, 1)
    )


def _cut(array: jax.Array, count: int, axis: int) -> jax.Array:
    """(count, ..., J / count, ...) of an array whose `axis` is the J positions."""
    shape = array.shape[:axis] + (count, -1) + array.shape[axis + 1 :]
    return jnp.moveaxis(array.reshape(shape), axis, 0)


def em(
    data: GroupData, centroids: jax.Array, iterations: int, axis: RowAxis = ALL_HERE
) -> jax.Array:
    """Alternates `assign` and `update`.

    Args:
      data: vectors of G groups.
      centroids: (G, K, D) seeds.
      iterations: number of alternations, at least 0.
      axis: where more rows of these groups are.

    Returns:
      Centroids (G, K, D).
    """

    def step(_, centroids):
        codes, _ = assign(data, centroids)
        return update(data, codes, centroids, axis)

    return lax.fori_loop(0, iterations, step, centroids)
