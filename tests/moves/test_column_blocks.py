"""The walk over blocks of columns: the same whatever their size, and what it is by definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gptvq_jax.moves.column_blocks import Coded, walk

COLS, ROWS = 12, 5


def problem():
    rng = np.random.default_rng(0)
    return rng.normal(size=(COLS, ROWS)), rng.normal(size=(COLS, COLS))


def swept(values, matrix):
    """Each column becomes half of what it is, and its other half moves those after it."""
    values = values.copy()
    for j in range(COLS):
        values[j] /= 2
        values[j + 1 :] -= np.outer(matrix[j, j + 1 :], values[j])
    return values


def descended(values, matrix):
    """Each column in turn moves all columns, itself too, by half of what it is."""
    values = values.copy()
    for j in range(COLS):
        values -= np.outer(matrix[j], values[j] / 2)
    return values


def coder(sweeps, axis=0):
    """Of one block; it finds the first column, and what each column was when it came to it."""

    def code(start, local, square, carry):
        local = jnp.moveaxis(local, axis, 0)
        size = len(local)

        def one(local, at):
            j, row = at
            half = local[j] / 2
            row = jnp.where(jnp.arange(size) > j, row, 0.0) if sweeps else row
            new = local - jnp.multiply.outer(row, half)
            new = new.at[j].set(half) if sweeps else new
            return new, (half, 2 * half)

        local, (change, found) = lax.scan(one, local, (jnp.arange(size), square))
        local, change = (jnp.moveaxis(x, 0, axis) for x in (local, change))
        return Coded(change, (start, found), local if sweeps else None, carry + jnp.sum(found))

    return code


@pytest.mark.parametrize("block", [1, 4, 12])
@pytest.mark.parametrize("sweeps", [True, False])
def test_blocks_of_any_size_make_what_single_columns_do(sweeps, block):
    values, matrix = problem()
    expected = (swept if sweeps else descended)(values, matrix)
    arrays = (jnp.asarray(x, jnp.float32) for x in (values, matrix))
    run = jax.jit(lambda v, m: walk(v, m, coder(sweeps), block, carry=jnp.float32(0)))
    got, carry, (starts, found) = run(*arrays)
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-4)
    assert starts.tolist() == list(range(0, COLS, block))
    np.testing.assert_allclose(carry, jnp.sum(found), rtol=1e-4)
    if sweeps:
        np.testing.assert_allclose(found.reshape(COLS, ROWS), 2 * expected, rtol=2e-4, atol=1e-4)


def test_part_of_the_columns_with_lanes_in_front():
    values, matrix = problem()
    stacked = jnp.asarray(np.stack([values, 2 * values]), jnp.float32)
    matrix = jnp.asarray(matrix, jnp.float32)

    def twice(values):
        return values[::-1]

    def code(*given):
        return coder(True, axis=1)(*given)._replace(moved=twice)

    got, _, (starts, _) = walk(
        stacked, matrix, code, 4, first=4, count=1, carry=jnp.float32(0), axis=1
    )
    assert starts.tolist() == [4]
    plain, *_ = walk(stacked[0], matrix, coder(True), 4, first=4, count=1, carry=jnp.float32(0))
    # Columns before are left alone, those of the block are what the coder says, those after get
    # what `moved` makes of them before they are moved.
    np.testing.assert_array_equal(got[:, :4], stacked[::-1, :4])
    np.testing.assert_allclose(got[0, 4:8], plain[4:8], rtol=1e-5)
    moved = np.asarray(stacked[0, 8:]) - np.asarray(plain[8:])
    np.testing.assert_allclose(got[0, 8:], np.asarray(stacked[1, 8:]) - moved, rtol=1e-4, atol=1e-5)
