"""Starting centroids for EM: the vectors of G groups and their random keys (G,) give (G, K, D).

Where more rows of these groups are on other devices (`axis`), the seeds are those of all rows.
"""

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.core.row_axis import ALL_HERE, RowAxis
from gptvq_jax.moves.em import GroupData


def mahalanobis(
    data: GroupData, codebook_size: int, keys: jax.Array, axis: RowAxis = ALL_HERE
) -> jax.Array:
    """K points evenly spaced in order of Mahalanobis distance to the mean (GPTVQ, section 3.2)."""
    del keys
    points, valid = _flatten(_gathered(data, axis))  # (G, D, N), (G, N)
    count = jnp.sum(valid, axis=1)
    mean = jnp.sum(points * valid[:, None], axis=2) / count[:, None]
    centered = (points - mean[..., None]) * valid[:, None]
    covariance = jnp.einsum("gdn,gen->gde", centered, centered, precision="highest")
    covariance = covariance / count[:, None, None]
    trace = jnp.trace(covariance, axis1=1, axis2=2)[:, None, None]
    floor = jnp.where(trace > 0, 1e-6 * trace, 1.0)
    factor = jnp.linalg.inv(covariance + floor * jnp.eye(points.shape[1]))
    distance = jnp.einsum("gdn,gde,gen->gn", centered, factor, centered, precision="highest")
    order = jnp.argsort(jnp.where(valid, distance, jnp.inf), axis=1)
    return _pick(points, order, count, codebook_size)


def cdf(
    data: GroupData, codebook_size: int, keys: jax.Array, axis: RowAxis = ALL_HERE
) -> jax.Array:
    """1D: the quantiles (k + 1/2) / K of the weights."""
    del keys
    if data.points.shape[2] != 1:
        raise ValueError("cdf seeding orders scalars: it needs dim=1")
    points, valid = _flatten(_gathered(data, axis))
    order = jnp.argsort(jnp.where(valid, points[:, 0], jnp.inf), axis=1)
    return _pick(points, order, jnp.sum(valid, axis=1), codebook_size)


def kmeans_plus_plus(
    data: GroupData, codebook_size: int, keys: jax.Array, axis: RowAxis = ALL_HERE
) -> jax.Array:
    """k-means++ in the EM metric: each new seed is drawn with probability weight x distance^2."""
    groups, positions, dim, rows = data.points.shape
    white = jnp.einsum("gjdr,jde->gjer", data.points, data.whiten, precision="highest")
    drawn = jax.vmap(lambda key: jax.random.uniform(key, (codebook_size, 2)), out_axes=1)(keys)

    def draw(mass, uniform):  # mass (G, J, r): a point in two stages, so that no long sum is needed
        # Just below 1, so that rounding never lands beyond the last point that has mass.
        def row_of_one(m, u):
            # All sums are compared at once: on an accelerator each step of a bisection is a kernel.
            at = (1 - 1e-5) * u * jnp.sum(m)
            return jnp.searchsorted(jnp.cumsum(m), at, method="compare_all")

        row_of = jax.vmap(row_of_one)
        position = row_of(axis.sum(jnp.sum(mass, axis=2)), uniform[:, 0])
        position = jnp.minimum(position, positions - 1)
        of_rows = jnp.take_along_axis(mass, position[:, None, None], 1)[:, 0]
        row = row_of(axis.all_rows(of_rows), uniform[:, 1])
        return position, jnp.minimum(row, (axis.rows or rows) - 1)

    def seed_at(mass, uniform):
        position, row = draw(mass, uniform)
        row = row - axis.index * rows
        here = (row >= 0) & (row < rows)  # on one of the devices
        own = data.points[jnp.arange(groups), position, :, jnp.clip(row, 0, rows - 1)]  # (G, D)
        seed = axis.sum(jnp.where(here[:, None], own, 0.0))
        center = jnp.einsum("gd,jde->gje", seed, data.whiten, precision="highest")
        distance = sum(jnp.square(white[:, :, d] - center[:, :, d, None]) for d in range(dim))
        return seed, distance

    def step(distance, uniform):
        seed, new = seed_at(data.weight * distance, uniform)
        return jnp.minimum(distance, new), seed

    first, distance = seed_at(data.weight, drawn[0])
    _, seeds = lax.scan(step, distance, drawn[1:])
    return jnp.concatenate([first[:, None], jnp.swapaxes(seeds, 0, 1)], axis=1)


def random_points(
    data: GroupData, codebook_size: int, keys: jax.Array, axis: RowAxis = ALL_HERE
) -> jax.Array:
    """K distinct points drawn with probability weight; all of them, repeated, where K is more.

    One pass over the points, where k-means++ needs one for each centroid: for large codebooks.
    """
    data = _gathered(data, axis)
    points, valid = _flatten(data)
    weight = data.weight.reshape(valid.shape)
    weight = weight / jnp.max(weight, axis=1, keepdims=True)  # its unit must not round differently
    # The K largest of log weight + Gumbel noise are a draw without replacement.
    noise = jax.vmap(lambda key: jax.random.gumbel(key, valid.shape[1:]))(keys)
    score = jnp.where(valid, jnp.log(jnp.where(valid, weight, 1.0)) + noise, -jnp.inf)
    _, order = lax.top_k(score, min(codebook_size, valid.shape[1]))
    index = jnp.arange(codebook_size) % jnp.minimum(jnp.sum(valid, axis=1), codebook_size)[:, None]
    index = jnp.take_along_axis(order, index, axis=1)
    return jnp.swapaxes(jnp.take_along_axis(points, index[:, None], axis=2), 1, 2)


def _gathered(data: GroupData, axis: RowAxis) -> GroupData:
    """With the rows of all devices: what is sorted or ranked is so as a whole."""
    points, weight = axis.all_rows(data.points), axis.all_rows(data.weight)
    return data._replace(points=points, weight=weight)


def _flatten(data: GroupData) -> tuple[jax.Array, jax.Array]:
    groups, _, dim, _ = data.points.shape
    points = jnp.moveaxis(data.points, 2, 1).reshape(groups, dim, -1)
    return points, data.weight.reshape(groups, -1) > 0


def _pick(points: jax.Array, order: jax.Array, count: jax.Array, codebook_size: int) -> jax.Array:
    """Points at K evenly spaced ranks of the `count` valid ones, (G, K, D)."""
    spaced = (jnp.arange(codebook_size) + 0.5) / codebook_size
    rank = jnp.floor(spaced * count[:, None]).astype(jnp.int32)
    index = jnp.take_along_axis(order, rank, axis=1)
    return jnp.swapaxes(jnp.take_along_axis(points, index[:, None], axis=2), 1, 2)


SEEDS = {
    "mahalanobis": mahalanobis,
    "kmeans++": kmeans_plus_plus,
    "cdf": cdf,
    "random": random_points,
}
