"""Codes given codebooks: coordinate descent over the vectors, all rows at once.

With the error E = W - Q and its gradient G = E H, replacing the vector at columns P by another one,
delta away, changes the loss by delta H_PP delta^T - 2 delta G_P^T. The best centroid is therefore
the one nearest to q_P + G_P H_PP^-1 in the metric H_PP; with several codebooks, the sum of
centroids that a beam search finds. Cost per pass and lane of the beam: 2 R C^2 flops of matmul and
M R C / D nearest-centroid searches, as a sweep. H E is known before the first pass and after the
last one.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.moves.beam import follow, lookup_lanes, search
from gptvq_jax.moves.column_blocks import Coded, walk
from gptvq_jax.moves.nearest import lookup
from gptvq_jax.moves.refit import decode
from gptvq_jax.moves.residual import Residual
from gptvq_jax.ops.column_frame import Block
from gptvq_jax.ops.columns import KERNELS


def recode(
    residual: Residual,
    hessian: jax.Array,
    centroids: jax.Array,
    codes: jax.Array,
    scales: jax.Array | None,
    grid: GroupGrid,
    *,
    passes: int = 1,
    beam: int = 1,
    block_size: int = 128,
    movable: jax.Array | None = None,
    native: str = "jax",
) -> tuple[jax.Array, Residual]:
    """Codes (M, S * c / D, G * r) whose loss is at most that of the codes given, in every row.

    Args:
      residual: of the codes given.
      hessian: (S * c, S * c) mean x x^T, zero on the padding.
      centroids: (M, S, G, K, D).
      codes: (M, S * c / D, G * r).
      scales: (S * c / D, G * r) or None.
      passes: passes over all columns.
      beam: alternatives that every row keeps on its way through the columns. The loss of one pass
        is at most that with 1, in every row.
      block_size: columns per lazy update of the gradient.
      movable: (S * c / D, G * r) bool, vectors that may get other codes; None: all of them.
      native: "jax", or a kernel that the caller knows to run here: "pallas_tpu", "pallas_gpu"
        (`ops.columns.choose_columns`), for one codebook and a beam of 1. Its sums run in another
        order.

    Returns:
      Codes, and their residual.
    """
    dim, rows = grid.dim, (grid.row_strips, grid.strip_rows)
    block = grid.block_cols(block_size)
    vectors = block // dim
    blocks = hessian.reshape(-1, dim, hessian.shape[0] // dim, dim)
    h_diagonal = jnp.moveaxis(jnp.diagonal(blocks, axis1=0, axis2=2), -1, 0)  # (J, D, D)
    trace = jnp.trace(h_diagonal, axis1=1, axis2=2)[:, None, None]
    # The ridge only steers the search; a new code is kept by its exact change of the loss.
    ridged = h_diagonal + (1e-6 * trace + (trace == 0)) * jnp.eye(dim)
    factor, inverse = jnp.linalg.cholesky(ridged), jnp.linalg.inv(ridged)

    def one_pass(_, state):
        codes, (error, image) = state
        gradient = image.reshape(-1, *rows)
        old_codes = codes.reshape(len(codes), -1, *rows)

        def vector_step(carry, position):
            local, h_local, books, change = carry  # local (L, B, G, r) = H E of the block's columns
            first = position * dim % block
            at = lambda table, axis=0: lax.dynamic_index_in_dim(table, position, axis, False)  # noqa: E731
            old = at(old_codes, 1)  # (M, G, r)
            s = jnp.ones((1, *rows)) if scales is None else at(scales).reshape(1, *rows)
            g = jnp.moveaxis(lax.dynamic_slice_in_dim(local, first, dim, 1), 2, 1)  # (L, G, D, r)
            old_vector = sum(map(lookup, books, old))  # (G, D, r)
            move = jnp.einsum("lgdr,de->lger", g, at(inverse), precision="highest") / s[:, :, None]
            target = jnp.einsum("lgdr,de->lger", old_vector + move, at(factor), precision="highest")
            white = jnp.matmul(books, at(factor), precision="highest")
            new, origin, exists = search(target, white, old, change / jnp.square(s), beam)
            new_vector = sum(lookup_lanes(book, new[:, m]) for m, book in enumerate(books))
            delta = (new_vector - old_vector) * s[:, :, None]
            bend = jnp.einsum("lgdr,de->lger", delta, at(h_diagonal), precision="highest")
            more = jnp.sum(delta * (bend - 2 * follow(g, origin, 2)), axis=2)  # (L, G, r)
            # Lane 0 never gets worse; the others may, on their way to something better.
            kept = (more < 0) | (jnp.arange(len(more)) > 0)[:, None, None]
            if movable is not None:
                kept &= at(movable).reshape(1, *rows)
            delta = jnp.moveaxis(jnp.where(kept[:, :, None], delta, 0.0), 2, 1)  # (L, D, G, r)
            change = follow(change, origin) + jnp.where(kept, more, 0.0)
            change = jnp.where(exists, change, jnp.inf)
            h = lax.dynamic_slice_in_dim(h_local, first, dim)  # (D, B)
            local = follow(local, origin, 1)
            local = local - jnp.einsum("db,ldgr->lbgr", h, delta, precision="highest")
            new = jnp.where(kept[:, None], new, old)
            return (local, h_local, books, change), (new, origin, delta)

        def block_step(start, local, h_local, change):  # local (L, B, G, r), change (L, G, r)
            strip = start // grid.strip_cols
            books = lax.dynamic_index_in_dim(centroids, strip, 1, keepdims=False)  # (M, G, K, D)
            (_, _, _, change), (new, origins, delta) = lax.scan(
                vector_step,
                (local, h_local, books, change),
                start // dim + jnp.arange(vectors),
            )
            origin, delta = _trace_back(origins, delta, 1)  # delta (vectors, L, D, G, r)
            delta = jnp.moveaxis(delta, 0, 1).reshape(beam, block, *rows)
            survived = partial(follow, parent=origin, axis=1)
            return Coded(delta, (new, origins), carry=change, moved=survived)

        lanes = jnp.broadcast_to(gradient, (beam, *gradient.shape))
        unused = (jnp.arange(beam) > 0)[:, None, None]  # at the start there is only lane 0
        change = jnp.where(unused, jnp.inf, jnp.zeros((beam, *rows)))
        lanes, change, (new, origins) = walk(
            lanes, hessian, block_step, block, carry=change, axis=1
        )
        new, origins = (x.reshape(-1, *x.shape[2:]) for x in (new, origins))
        best = jnp.argmin(change, axis=0, keepdims=True)
        _, new = _trace_back(origins, new, 1, best)  # (J, 1, M, G, r)
        new = jnp.moveaxis(new[:, 0], 1, 0).reshape(codes.shape)
        image = follow(lanes, best, 1)[0].reshape(image.shape)
        change = decode(centroids, new, scales, grid) - decode(centroids, codes, scales, grid)
        return new, Residual(error - change, image)

    def kernel_pass(_, state):
        codes, (error, image) = state

        def block_step(start, image, hessian, codes):
            of, tables = (block, start, image, hessian), (inverse, factor, h_diagonal)
            block_of = Block(*of, tables, centroids[0], scales, grid.strip_cols)
            codes, delta = KERNELS[native].recode(block_of, codes)
            return Coded(delta, None, carry=codes)

        image, new, _ = walk(image, hessian, block_step, block, carry=codes[0], whole=True)
        new = new[None]
        change = decode(centroids, new, scales, grid) - decode(centroids, codes, scales, grid)
        return new, Residual(error - change, image)

    if native != "jax" and (beam, len(centroids)) != (1, 1):
        raise NotImplementedError(
            f"{native=} takes one codebook and a beam of 1, not {len(centroids)} and {beam}; "
            "leave native out"
        )
    one = one_pass if native == "jax" else kernel_pass
    return lax.fori_loop(0, passes, one, (codes, residual))


def _trace_back(origins, values, axis, last=None):
    """Values of every step along the lanes that survived to the end.

    Args:
      origins: (steps, L, G, r), the lane that each lane of a step continues.
      values: (steps, L, ..., G, r) with one more axis, `axis` of a step.
      last: (L', G, r) lanes of the last step; None: all of them.

    Returns:
      The lanes before the first step that they started from (L', G, r), and values of their steps.
    """
    lanes = origins.shape[1]
    if lanes == 1:
        return origins[0], values
    if last is None:
        last = jnp.broadcast_to(jnp.arange(lanes)[:, None, None], origins.shape[1:])

    def step(lane, at):
        origin, value = at
        return follow(origin, lane), follow(value, lane, axis)

    return lax.scan(step, last, (origins, values), reverse=True)
