"""The column sweep with trellis codes: one column at a time, its error fed into the columns after.

The feedback is that of sweep.py with D = 1. Within a column all rows have one metric, 1 / U_jj^2 up
to their scales, so the search over a stream is exact. The program is one for all columns, whatever
their rates.
"""

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.moves.column_blocks import Coded, walk
from gptvq_jax.moves.stream_column import (
    Column,
    Layout,
    best_scale,
    column_values,
    first_scale,
    search_column,
    with_outliers,
)


def sweep_streams(
    weight: jax.Array,
    hinv_chol: jax.Array,
    rates: jax.Array,
    outliers: jax.Array,
    layout: Layout,
    *,
    stream_rows: int,
    block_size: int = 128,
    native: str = "jax",
) -> tuple[Column, jax.Array]:
    """Codes a weight column by column with error feedback.

    Args:
      weight: transposed and padded (C', R'), C' a multiple of `block_size`.
      hinv_chol: U (C', C'), identity on the padding.
      rates: K_j (C',), 0 on the padding.
      outliers: (C', R') bool: weights that are kept beside the codes.
      layout: what columns share.
      stream_rows: T.
      block_size: columns per lazy update.
      native: as in `search_streams`.

    Returns:
      All columns, and what they stand for (C', R').
    """
    row_weight = layout.row_weight()

    def one_column(local, at):
        position, u, rate, kept = at  # u (B,): of the block
        w = lax.dynamic_index_in_dim(local, position, keepdims=False)
        target, counts = w / layout.row_scales, row_weight * ~kept
        scale = first_scale(target, counts, rate, layout)
        windows = search_column(target, counts, scale, rate, layout, stream_rows, native)
        scale = best_scale(windows, target, counts, layout)
        column = Column(windows, scale, jnp.zeros(len(w), jnp.float16))
        column = with_outliers(column, rate, layout, w, kept)
        q = column_values(column, rate, layout)
        error = (w - q) * layout.used / u[position]
        rest = jnp.where(jnp.arange(block_size) > position, u, 0.0)
        local = local - rest[:, None] * error
        return lax.dynamic_update_index_in_dim(local, q, position, 0), (column, error)

    def one_block(start, local, u_local, _):
        part = lambda x: lax.dynamic_slice_in_dim(x, start, block_size)  # noqa: E731
        steps = jnp.arange(block_size), u_local, part(rates), part(outliers)
        local, (columns, error) = lax.scan(one_column, local, steps)
        return Coded(error, columns, local)

    weight, _, columns = walk(weight, hinv_chol, one_block, block_size)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), columns), weight
