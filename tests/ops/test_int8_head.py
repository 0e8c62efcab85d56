"""A head as int8 rows: the kernel multiplies with the levels, and what is looked up stays exact."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.core.int8_rows import dequantize_rows, int8_rows
from gptvq_jax.ops.int8_head import Int8Head

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)


# Whole vectors of bytes and parts of one, rows that are no whole tile, one row of x and several.
@pytest.mark.parametrize(("rows", "cols", "batch"), [(257, 192, 1), (1030, 83, 3), (3, 5, 2)])
def test_products_are_with_the_levels_to_float32(rows, cols, batch):
    rng = np.random.default_rng(cols)
    weight = rng.normal(size=(rows, cols)).astype(np.float32)
    weight *= np.exp(rng.normal(size=(rows, 1)))
    weight[2] = 0
    x = rng.normal(size=(batch, cols)).astype(np.float32)
    x[:, 1] *= 40  # which one scale for a row of x must not drown
    y = jnp.asarray(x)[:, None] @ Int8Head.rounded(weight, tied=False)
    assert y.shape == (batch, 1, rows)
    exact = x.astype(np.float64) @ dequantize_rows(int8_rows(weight)).astype(np.float64).T
    error = np.linalg.norm(y[:, 0] - exact) / np.linalg.norm(exact)
    assert error < 1e-6
    rounding = np.linalg.norm(y[:, 0] - x @ weight.T) / np.linalg.norm(exact)
    assert error < rounding < 1e-2  # the levels are not the weight


def test_tied_rows_are_looked_up_exactly():
    weight = np.random.default_rng(0).normal(size=(40, 24)).astype(np.float16)
    head, levels = Int8Head.rounded(weight, tied=True), Int8Head.rounded(weight, tied=False)
    tokens = jnp.array([[3, 39]])
    np.testing.assert_array_equal(head.take(tokens), weight[np.array([[3, 39]])])
    assert not np.array_equal(levels.take(tokens), head.take(tokens))


def test_wrong_columns_are_refused():
    head = Int8Head.rounded(np.ones((4, 8), np.float32), tied=False)
    with pytest.raises(ValueError, match="x has 7 columns, the weight 8"):
        jnp.ones((2, 7)) @ head
