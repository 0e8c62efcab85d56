"""The walk over blocks of columns: what one block changes is fed to the others, lazily.

A sweep takes a weight W and U, upper triangular: the error of a block, in units of U, moves the
columns after it. Coordinate descent takes the image H E of the residual and H: a change of a block
moves the image everywhere. In both a coder goes through the columns of a block one by one, with the
part of the matrix that lies within the block, and one product of matrices per block tells the rest.
Cost: 2 R C^2 over all blocks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Coded(NamedTuple):
    """What a coder has made of a block of B columns."""

    change: jax.Array  # (B, ...): what the rows of the matrix, times it, take from other columns
    found: Any  # a pytree: codes and whatever else is to be kept
    local: jax.Array | None = None  # (B, ...) the columns from now on, which nothing moves any
    # more, nor those before them; None: they are columns like all others
    carry: Any = None  # for the coder of the next block
    moved: Callable[[jax.Array], jax.Array] = lambda values: values  # before the change is taken


# (first column, (B, ...) columns, (B, B) matrix within the block, carry) -> Coded
Coder = Callable[[jax.Array, jax.Array, jax.Array, Any], Coded]


def walk(
    values: jax.Array,
    matrix: jax.Array,
    code: Coder,
    block: int,
    *,
    first: int | jax.Array = 0,
    count: int | None = None,
    carry: Any = None,
    axis: int = 0,
    whole: bool = False,
) -> tuple[jax.Array, Any, Any]:
    """Takes a coder through blocks of columns.

    Args:
      values: (C, ...), or with columns on another axis.
      matrix: (C, C), whose row j says how a change of column j moves the columns.
      code: of one block; traced once.
      block: B.
      first, count: the first column, and how many blocks from there; None: all of them.
      carry: for the coder of the first block.
      axis: of the columns in `values`.
      whole: the coder takes values and matrix as they are, and cuts the block out itself.

    Returns:
      Values, the carry of the last block, and what was found, (count, ...).
    """
    cols = len(matrix)
    column = jnp.arange(cols)

    def one_block(state, index):
        values, carry = state
        start = first + index * block
        rows = lax.dynamic_slice_in_dim(matrix, start, block)
        square = lax.dynamic_slice_in_dim(rows, start, block, axis=1)
        local = lax.dynamic_slice_in_dim(values, start, block, axis)
        coded = code(start, *((values, matrix) if whole else (local, square)), carry)
        if coded.local is not None:
            rows = jnp.where(column >= start + block, rows, 0.0)
        change = jnp.moveaxis(coded.change, axis, 0)
        update = jnp.matmul(rows.T, change.reshape(block, -1), precision="highest")
        update = jnp.moveaxis(update.reshape(cols, *change.shape[1:]), 0, axis)
        values = coded.moved(values) - update
        if coded.local is not None:
            values = lax.dynamic_update_slice_in_dim(values, coded.local, start, axis)
        return (values, coded.carry), coded.found

    blocks = jnp.arange(cols // block if count is None else count)
    (values, carry), found = lax.scan(one_block, (values, carry), blocks)
    return values, carry, found
