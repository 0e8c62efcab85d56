"""Codes given codebooks: coordinate descent over the vectors, all rows at once.

With the error E = W - Q and its gradient G = E H, replacing the vector at columns P by another one,
delta away, changes the loss by delta H_PP delta^T - 2 delta G_P^T. The best centroid is therefore
the one nearest to q_P + G_P H_PP^-1 in the metric H_PP. Cost per pass: 2 R C^2 flops of matmul and
R C / D nearest-centroid searches, as a sweep.
"""

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.grid import GroupGrid
from gptvq_jax.moves.nearest import lookup, nearest
from gptvq_jax.moves.refit import decode


def recode(
    weight: jax.Array,
    hessian: jax.Array,
    centroids: jax.Array,
    codes: jax.Array,
    scales: jax.Array | None,
    grid: GroupGrid,
    *,
    passes: int = 1,
    block_size: int = 128,
) -> jax.Array:
    """Codes (S * c / D, G * r) whose loss is at most that of the codes given.

    Args:
      weight: (S * c, G * r), transposed and padded with zeros.
      hessian: (S * c, S * c) mean x x^T, zero on the padding.
      centroids: (S, G, K, D).
      codes: (S * c / D, G * r).
      scales: (S * c / D, G * r) or None.
      passes: passes over all columns.
      block_size: columns per lazy update of the gradient.
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

    def block_step(carry, index):
        gradient, codes = carry  # gradient (S * c, G, r) = H E
        start = index * block
        h_rows = lax.dynamic_slice_in_dim(hessian, start, block)  # (B, S * c)
        h_local = lax.dynamic_slice_in_dim(h_rows, start, block, axis=1)
        strip = start // grid.strip_cols
        books = lax.dynamic_index_in_dim(centroids, strip, keepdims=False)  # (G, K, D)

        def vector_step(local, j):
            position = start // dim + j
            code = lax.dynamic_index_in_dim(codes, position, keepdims=False)  # (G, r)
            s = jnp.ones(rows)
            if scales is not None:
                s = lax.dynamic_index_in_dim(scales, position, keepdims=False).reshape(rows)
            g = jnp.moveaxis(lax.dynamic_slice_in_dim(local, j * dim, dim), 1, 0)  # (G, D, r)
            pick = lambda table: lax.dynamic_index_in_dim(table, position, keepdims=False)  # noqa: E731
            old = lookup(books, code)
            scale = jnp.expand_dims(s, -2)
            move = jnp.einsum("gdr,de->ger", g, pick(inverse), precision="highest") / scale
            white = jnp.einsum("gdr,de->ger", old + move, pick(factor), precision="highest")
            new_code, _ = nearest(white, jnp.matmul(books, pick(factor), precision="highest"))
            delta = (lookup(books, new_code) - old) * scale
            bend = jnp.einsum("gdr,de->ger", delta, pick(h_diagonal), precision="highest")
            better = jnp.sum(delta * (bend - 2 * g), axis=1) < 0  # (G, r)
            delta = jnp.moveaxis(jnp.where(better[:, None], delta, 0.0), 1, 0)  # (D, G, r)
            h = lax.dynamic_slice_in_dim(h_local, j * dim, dim)  # (D, B)
            local = local - jnp.einsum("db,dgr->bgr", h, delta, precision="highest")
            return local, (jnp.where(better, new_code, code), delta)

        local = lax.dynamic_slice_in_dim(gradient, start, block)
        _, (new_codes, delta) = lax.scan(vector_step, local, jnp.arange(vectors))
        delta = delta.reshape(block, -1)
        update = jnp.matmul(h_rows.T, delta, precision="highest").reshape(gradient.shape)
        codes = lax.dynamic_update_slice_in_dim(codes, new_codes, start // dim, axis=0)
        return (gradient - update, codes), None

    def one_pass(_, codes):
        error = weight - decode(centroids, codes, scales, grid)
        gradient = jnp.matmul(hessian, error, precision="highest")
        carry = gradient.reshape(-1, *rows), codes.reshape(-1, *rows)
        (_, codes), _ = lax.scan(block_step, carry, jnp.arange(grid.padded_cols // block))
        return codes.reshape(-1, grid.padded_rows)

    return lax.fori_loop(0, passes, one_pass, codes)
