"""Levels of a trellis's table given the streams: the loss is a convex quadratic in them too.

A window stands for one of 2^B levels, that of its rank's highest B bits, times the scales of its
row and column. Outliers stay what they add.
"""

import jax
import jax.numpy as jnp

from gptvq_jax.core.trellis_tensor import table_values
from gptvq_jax.moves.refit import least_squares
from gptvq_jax.moves.residual import Residual
from gptvq_jax.moves.stream_column import Column, Layout, coded_values


def refit_levels(
    residual: Residual,
    hessian: jax.Array,
    levels: jax.Array,
    columns: Column,
    rates: jax.Array,
    layout: Layout,
    iterations: int | jax.Array,
) -> tuple[jax.Array, Residual]:
    """Levels (2^B,) float16 of no larger loss than those given, and their residual.

    Args:
      residual: of the levels given, (C', R').
      hessian: (C', C') mean x x^T, zero on the padding.
      levels: (2^B,) float16.
      columns: all of them.
      rates: K_j (C',).
      layout: what columns share; of its table only the size counts.
      iterations: conjugate-gradient steps; each costs 2 R C^2 flops.
    """
    window_bits = layout.window_bits

    def forward(levels):
        table = table_values(window_bits, levels)
        return coded_values(columns, rates, layout._replace(table=table))

    scales = jnp.where(rates > 0, columns.scale.astype(jnp.float32), 0.0)[:, None]
    factor = scales * layout.row_scales * layout.used
    start = levels.astype(jnp.float32)
    found, _ = least_squares(
        residual,
        hessian,
        start,
        forward,
        lambda levels: factor * forward(levels),
        iterations,
        axis=layout.axis,
        shared=True,
    )
    stored = found.astype(jnp.float16)
    moved = residual.moved(forward(stored.astype(jnp.float32) - start), hessian)
    total = layout.axis.sum
    better = total(moved.loss) < total(residual.loss)  # rounding may undo a small gain
    return jax.tree.map(
        lambda new, old: jnp.where(better, new, old), (stored, moved), (levels, residual)
    )
