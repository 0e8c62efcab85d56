"""Streams and scales again, given all other columns: coordinate descent over columns.

With the error E = W - Q and its image H E, moving column j from q to q' changes the loss by
H_jj (|q' - y|^2 - |q - y|^2) with y = q + (H E)_j / H_jj. So the best streams are those nearest to
y, and each is searched for once, for its ends stay tied where they are: to look for another
overlap costs up to half a search, and lowers errors by 0.1 %. Outliers move to y itself and the
scale to that of least squares. What does not lower the loss is
not taken, stream by stream, and scale by scale.
"""

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.moves.column_blocks import Coded, walk
from gptvq_jax.moves.residual import Residual
from gptvq_jax.moves.stream_column import (
    Column,
    Layout,
    best_scale,
    column_values,
    overlaps,
    search_column,
    with_outliers,
)


def recode_streams(
    residual: Residual,
    hessian: jax.Array,
    columns: Column,
    rates: jax.Array,
    outliers: jax.Array,
    layout: Layout,
    *,
    stream_rows: int,
    block_size: int = 128,
    native: str = "jax",
    movable: jax.Array | None = None,
) -> tuple[Column, Residual]:
    """Columns whose loss is at most that of those given, and their residual; one pass over them.

    Args:
      residual: of the columns given, (C', R').
      hessian: (C', C') mean x x^T, zero on the padding.
      columns: all of them.
      rates, outliers, layout, stream_rows, block_size, native: as in `sweep_streams`.
      movable: (C', streams of a column) bool, those that may get other codes, while all scales
        and what outliers add stay; None: all, and these follow.
    """
    row_weight = layout.row_weight()

    def one_column(local, at):
        position, h, rate, kept, may, old = at  # h (B,): of the block; local (B, R') = H E
        bend = h[position]
        q = column_values(old, rate, layout)
        image = lax.dynamic_index_in_dim(local, position, keepdims=False)
        y = q + image / jnp.where(bend > 0, bend, 1.0)
        target, counts = y / layout.row_scales, row_weight * ~kept

        def gain(new, old):
            """How much nearer to y the streams (n,) of one column are than those of another."""
            near, far = (jnp.square(column_values(c, rate, layout) - y) for c in (new, old))
            return jnp.sum((far - near).reshape(-1, stream_rows), axis=1)

        scale = old.scale.astype(jnp.float32)
        cut = overlaps(old.windows, rate, layout, stream_rows)
        windows = search_column(target, counts, scale, rate, layout, stream_rows, native, cut)
        new = old._replace(windows=windows)
        if may is None:
            new = with_outliers(new, rate, layout, y, kept)
        lower = gain(new, old) > 0
        taken = jnp.repeat(lower if may is None else lower & may, stream_rows)
        windows, added = (jnp.where(taken, a, b) for a, b in zip(new[::2], old[::2], strict=True))
        new = Column(windows, old.scale, added)
        if may is None:
            scaled = new._replace(scale=best_scale(windows, target, counts, layout))
            scaled = with_outliers(scaled, rate, layout, y, kept)
            better = jnp.sum(layout.axis.gather(gain(scaled, new), 0)) > 0
            new = jax.tree.map(lambda a, b: jnp.where(better, a, b), scaled, new)
        new = jax.tree.map(lambda a, b: jnp.where((bend > 0) & (rate > 0), a, b), new, old)
        change = column_values(new, rate, layout) - q
        return local - h[:, None] * change, (new, change)

    def one_block(start, local, h_local, _):
        part = lambda x: lax.dynamic_slice_in_dim(x, start, block_size)  # noqa: E731
        of_block = jax.tree.map(part, (rates, outliers, movable, columns))
        steps = jnp.arange(block_size), h_local, *of_block
        _, (new, change) = lax.scan(one_column, local, steps)
        return Coded(change, (new, change))

    image, _, found = walk(residual.image, hessian, one_block, block_size)
    new, change = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
    return new, Residual(residual.error - change, image)
