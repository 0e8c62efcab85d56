"""One column of trellis-coded weights: its streams, its scale and what its outliers add."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptvq_jax.core.row_axis import ALL_HERE, RowAxis
from gptvq_jax.moves.excess import spread
from gptvq_jax.moves.viterbi import search_streams


class Layout(NamedTuple):
    """What all columns share, in the transposed, padded layout: rows R' are whole streams."""

    row_scales: jax.Array  # (R',) float32, 1 on padding
    used: jax.Array  # (R',) 1, and 0 on padding
    table: jax.Array  # (2^L,)
    axis: RowAxis = ALL_HERE  # where more rows are; what is summed over rows is over all of them

    @property
    def window_bits(self) -> int:
        """L."""
        return len(self.table).bit_length() - 1

    def row_weight(self) -> jax.Array:
        """(R',) of the squared error of a weight over its row's scale, of mean 1; 0 on padding."""
        square = jnp.square(self.row_scales) * self.used
        return square / jnp.maximum(jnp.mean(self.axis.all_rows(square)), 1e-30)


class Column(NamedTuple):
    """A coded column, or with one more axis in front all of them."""

    windows: jax.Array  # (R',) uint16
    scale: jax.Array  # () float16
    added: jax.Array  # (R',) float16, 0 but for outliers


def column_values(column: Column, rate: jax.Array, layout: Layout) -> jax.Array:
    """What a column stands for, (R',) float32, in the operations of TrellisTensor.dequantize."""
    return coded_values(column, rate, layout) + column.added.astype(jnp.float32) * layout.used


def coded_values(column: Column, rate: jax.Array, layout: Layout) -> jax.Array:
    """`column_values` without what is added; of one column or all of them."""
    scale = jnp.where(rate > 0, column.scale.astype(jnp.float32), 0.0)[..., None]
    return layout.table[column.windows] * scale * layout.row_scales * layout.used


def with_outliers(column: Column, rate, layout: Layout, target: jax.Array, outliers: jax.Array):
    """The column whose outliers come as close to the target (R',) as float16 does."""
    none = jnp.zeros_like(column.added)
    gap = target - column_values(column._replace(added=none), rate, layout)
    return column._replace(added=jnp.where(outliers, gap, 0.0).astype(jnp.float16))


def first_scale(target: jax.Array, weight: jax.Array, rate: jax.Array, layout: Layout) -> jax.Array:
    """The scale at which a column of unit rows is searched for, (): its deviation, spread."""
    weight, target = map(layout.axis.all_rows, (weight, target))
    square = jnp.sum(weight * jnp.square(target)) / jnp.maximum(jnp.sum(weight), 1e-30)
    return jnp.sqrt(square) / jnp.asarray(spread(layout.window_bits))[rate]


def best_scale(
    windows: jax.Array, target: jax.Array, weight: jax.Array, layout: Layout
) -> jax.Array:
    """The scale of least squares between table values and a column of unit rows, as stored."""
    windows, target, weight = map(layout.axis.all_rows, (windows, target, weight))
    coded = layout.table[windows]
    norm = jnp.sum(weight * jnp.square(coded))
    scale = jnp.sum(weight * coded * target) / jnp.where(norm > 0, norm, 1.0)
    return scale.astype(jnp.float16)


def overlaps(windows: jax.Array, rate: jax.Array, layout: Layout, stream_rows: int) -> jax.Array:
    """The first L - K bits of the streams of a column's windows (R',), (n,) int32."""
    first = windows.reshape(-1, stream_rows)[:, 0].astype(jnp.int32)
    return first & (jnp.left_shift(1, layout.window_bits - rate) - 1)


def search_column(
    target: jax.Array,
    weight: jax.Array,
    scale: jax.Array,
    rate: jax.Array,
    layout: Layout,
    stream_rows: int,
    native: str,
    overlap: jax.Array | None = None,
) -> jax.Array:
    """Windows (R',) uint16 of the streams that come closest at a given scale.

    Args:
      target: (R',) the column over its row scales.
      weight: (R',) of the squared error of each row; 0 where it does not count.
      scale: () float32, 0 where the column is.
      overlap: (n,) int32, the first L - K bits of each stream, where they are to stay.
    """
    unit = jnp.where(weight > 0, target / jnp.where(scale > 0, scale, 1.0), 0.0)
    streams = (x.reshape(-1, stream_rows) for x in (unit, weight))
    windows, _ = search_streams(*streams, layout.table, rate, overlap, native=native)
    return windows.reshape(-1).astype(jnp.uint16)
