"""The column sweep: quantize D columns at a time, feed their error into the columns to the right.

With U upper triangular, U^T U = H^-1, and P the D columns in turn, the best choice of the columns
after P makes the loss |E|^2 with E = (W_P - Q_P) U_PP^-1, and moves them by -E U_{P,rest}
(GPTVQ, Algorithm 1, in exact block form). Updates beyond a block of columns are applied lazily,
one matmul per block. Cost: 2 R C^2 flops of matmul and R C / D nearest-centroid searches.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.moves.column_blocks import Coded, walk
from gptvq_jax.moves.em import GroupData
from gptvq_jax.moves.nearest import lookup, nearest
from gptvq_jax.moves.refit import decode
from gptvq_jax.moves.scales import StripScales
from gptvq_jax.ops.column_frame import Block
from gptvq_jax.ops.columns import KERNELS

# Codebooks (G, K, D) for the vectors of one column strip, drawn or fitted when it is reached, with
# a random key for each of its G groups.
Fit = Callable[[GroupData, jax.Array], jax.Array]
# Scales for the weights (c, G, r) of one column strip.
Normalize = Callable[[jax.Array], StripScales]


class SweepResult(NamedTuple):
    """Everything in the transposed, padded layout of grid.py."""

    codes: jax.Array  # (S * c / D, G * r) int32
    centroids: jax.Array  # (S, G, K, D) float32
    scales: StripScales | None  # stacked over strips
    quantized: jax.Array  # (S * c, G * r)
    loss: (
        jax.Array
    )  # () float32: sum |E|^2 = L(Q) with the damped Hessian, rows of padding left out


def pad_identity(hinv_chol: jax.Array, grid: GroupGrid) -> jax.Array:
    """U (C, C) with the identity on columns of padding, which keeps them out of the feedback."""
    pad = grid.padded_cols - grid.cols
    return jax.scipy.linalg.block_diag(hinv_chol, jnp.eye(pad)) if pad else hinv_chol


def whitening(hinv_chol: jax.Array, grid: GroupGrid) -> jax.Array:
    """T_j = U_jj^-1 for every vector position, zero on columns of padding.

    Args:
      hinv_chol: U (S * c, S * c).

    Returns:
      (S * c / D, D, D).
    """
    blocks = hinv_chol.reshape(-1, grid.dim, hinv_chol.shape[0] // grid.dim, grid.dim)
    diagonal = jnp.moveaxis(jnp.diagonal(blocks, axis1=0, axis2=2), -1, 0)  # (J, D, D)
    valid = (jnp.arange(grid.padded_cols) < grid.cols).reshape(-1, grid.dim).astype(jnp.float32)
    return jnp.linalg.inv(diagonal) * valid[:, :, None] * valid[:, None, :]


def diagonal_only(whiten: jax.Array, hinv_chol: jax.Array) -> jax.Array:
    """The paper's metric: each coordinate of a vector weighted alone, by 1 / U_jj."""
    dim = whiten.shape[-1]
    inverse = (1 / jnp.diagonal(hinv_chol)).reshape(-1, dim)
    valid = jnp.diagonal(whiten, axis1=1, axis2=2) != 0
    return jnp.where(valid, inverse, 0.0)[:, :, None] * jnp.eye(dim)


def sweep(
    weight: jax.Array,
    hinv_chol: jax.Array,
    grid: GroupGrid,
    fit: Fit,
    key: jax.Array,
    *,
    first_strip: int | jax.Array = 0,
    block_size: int = 128,
    exact_metric: bool = True,
    normalize: Normalize | None = None,
    native: str = "jax",
) -> SweepResult:
    """Quantizes a weight column by column with error feedback.

    Args:
      weight: transposed and padded (S * c, G * r).
      hinv_chol: U (S * c, S * c), identity on the padding. The identity everywhere turns error
        feedback off (round to nearest).
      grid: geometry of the groups.
      fit: makes the codebooks of a column strip when the sweep reaches it.
      key: random key for `fit`; every group draws from its own part of it.
      first_strip: number of the first row strip, where the weight is a part of a taller one: each
        part draws what the whole would.
      block_size: columns per lazy update, at most a strip.
      exact_metric: assign codes in the metric of the whole D x D block; False: its diagonal.
      normalize: makes block scales of a column strip, or None.
      native: "jax", or a kernel that the caller knows to run here: "pallas_tpu", "pallas_gpu"
        (`ops.columns.choose_columns`). Its sums run in another order, and U must be 0 below the
        diagonal.
    """
    dim, rows = grid.dim, grid.strip_rows
    weight = weight.reshape(grid.padded_cols, grid.row_strips, rows)
    feedback = whitening(hinv_chol, grid)
    metric = feedback if exact_metric else diagonal_only(feedback, hinv_chol)
    row_mask = grid.row_mask().reshape(grid.row_strips, rows).astype(jnp.float32)
    block = grid.block_cols(block_size)
    row_strips = first_strip + jnp.arange(grid.row_strips)

    def fitted(weight, strip):
        """First column of a strip, its codebooks, and its scales: as found, and of each vector."""
        start = strip * grid.strip_cols
        current = lax.dynamic_slice_in_dim(weight, start, grid.strip_cols)
        first = start // dim
        whiten = lax.dynamic_slice_in_dim(metric, first, grid.strip_vectors)
        scales = None if normalize is None else normalize(current)
        per_vector = jnp.ones((grid.strip_vectors, *row_mask.shape))  # (J, G, r)
        if scales is not None:
            per_vector = scales.per_vector(dim)
        points = current.reshape(grid.strip_vectors, dim, grid.row_strips, rows)
        points = jnp.moveaxis(points / per_vector[:, None], 2, 0)  # (G, J, D, r)
        used = jnp.any(whiten != 0, axis=(1, 2))[:, None, None]  # not a vector of padding
        point_weight = jnp.moveaxis(jnp.square(per_vector) * row_mask * used, 1, 0)
        data = GroupData(points, whiten, point_weight)
        of_strip = jax.random.fold_in(key, strip)
        centroids = fit(data, jax.vmap(partial(jax.random.fold_in, of_strip))(row_strips))
        return start, centroids, scales, per_vector

    def strip_step(weight, strip):
        start, centroids, scales, per_vector = fitted(weight, strip)
        weight, loss, codes = walk(
            weight,
            hinv_chol,
            partial(block_step, start, centroids, per_vector),
            block,
            first=start,
            count=grid.strip_cols // block,
            carry=jnp.float32(0),
        )
        return weight, (codes.reshape(-1, *row_mask.shape), centroids, scales, loss)

    def block_step(strip_start, centroids, per_vector, start, local, u_local, loss):
        def vector_step(local, j):
            u = lax.dynamic_slice_in_dim(u_local, j * dim, dim)  # (D, B)
            x = lax.dynamic_slice_in_dim(local, j * dim, dim)  # (D, G, r)
            t = lax.dynamic_index_in_dim(feedback, start // dim + j, keepdims=False)
            m = lax.dynamic_index_in_dim(metric, start // dim + j, keepdims=False)
            s = lax.dynamic_index_in_dim(per_vector, first + j, keepdims=False)
            white = jnp.einsum("dgr,de->ger", x / s, m, precision="highest")
            codes, _ = nearest(white, jnp.matmul(centroids, m, precision="highest"))
            q = jnp.moveaxis(lookup(centroids, codes), 1, 0) * s
            error = jnp.einsum("dgr,de->egr", x - q, t, precision="highest") * row_mask
            rest = u * (jnp.arange(block) >= (j + 1) * dim)
            local = local - jnp.einsum("eb,egr->bgr", rest, error, precision="highest")
            local = lax.dynamic_update_slice_in_dim(local, q, j * dim, axis=0)
            return local, (codes, error)

        first = (start - strip_start) // dim
        local, (codes, error) = lax.scan(vector_step, local, jnp.arange(block // dim))
        error = error.reshape(local.shape)
        return Coded(error, codes, local, loss + jnp.sum(jnp.square(error)))

    def kernel_strip(state, strip):
        weight, *found = state  # columns that are coded hold nothing of use any more
        start, centroids, scales, per_vector = fitted(weight.reshape(-1, *row_mask.shape), strip)
        scale = None if scales is None else per_vector.reshape(len(per_vector), -1)

        def coder(start, weight, hinv_chol, found):
            of, tables = (block, start, weight, hinv_chol), (metric, feedback)
            block_of = Block(*of, tables, centroids[None], scale, grid.strip_cols)
            *found, error = KERNELS[native].sweep(block_of, *found, grid.rows)
            return Coded(error, None, carry=found)

        count = grid.strip_cols // block
        weight, found, _ = walk(
            weight, hinv_chol, coder, block, first=start, count=count, carry=found, whole=True
        )
        return (weight, *found), (centroids, scales)

    if native != "jax":
        shape = grid.padded_cols // dim, grid.padded_rows
        state = weight.reshape(grid.padded_cols, -1), jnp.zeros(shape, jnp.int32)
        (_, codes, loss), (centroids, scales) = lax.scan(
            kernel_strip, (*state, jnp.zeros(shape[1])), jnp.arange(grid.col_strips)
        )
        stacked = scales and jax.vmap(lambda s: s.per_vector(dim))(scales).reshape(shape)
        quantized = decode(centroids[None], codes[None], stacked, grid)
        return SweepResult(codes, centroids, scales, quantized, jnp.sum(loss))
    weight, (codes, centroids, scales, loss) = lax.scan(
        strip_step, weight, jnp.arange(grid.col_strips)
    )
    return SweepResult(
        codes.reshape(-1, grid.padded_rows),
        centroids,
        scales,
        weight.reshape(grid.padded_cols, grid.padded_rows),
        grid.axis.sum(jnp.sum(loss)),
    )
