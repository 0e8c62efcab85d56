"""Grids of equally spaced levels: their groups, and the levels of scale 1."""

import jax
import jax.numpy as jnp

from gptvq_jax.core.grid import GroupGrid


def uniform_grid(rows: int, cols: int, group_size: int) -> GroupGrid:
    """Groups of one row; its columns are cut evenly into groups of at least `group_size`."""
    groups = max(1, cols // group_size) if group_size else 1
    return GroupGrid(rows, cols, dim=1, strip_rows=1, strip_cols=-(-cols // groups))


def basis(size: int, symmetric: bool) -> jax.Array:
    """Right factor (p, K): [k - (K - 1) / 2], or [k, 1]."""
    level = jnp.arange(size, dtype=jnp.float32)
    if symmetric:
        return (level - (size - 1) / 2)[None]
    return jnp.stack([level, jnp.ones_like(level)])
