"""Weights stored by rows against the matrices that they stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import random_tensor

from gptvq_jax.core import row_weight
from gptvq_jax.core.int8_rows import dequantize_rows, int8_rows
from gptvq_jax.core.row_weight import RowWeight

ROWS, COLS = 50, 12
KINDS = ("float32", "float16", "bfloat16", "int8")


def make(kind):
    """A leaf and its float64 matrix."""
    matrix = np.random.default_rng(0).normal(size=(ROWS, COLS)).astype(np.float32)
    if kind == "int8":
        tensor = int8_rows(matrix)
        return RowWeight.from_int8_rows(tensor), dequantize_rows(tensor).astype(np.float64)
    values = jnp.asarray(matrix, kind)
    return RowWeight(values), np.asarray(values, np.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [2**20, 84])  # 84: 7 rows at a time, which do not divide 50
def test_product(kind, chunk, monkeypatch):
    monkeypatch.setattr(row_weight, "_CHUNK_VALUES", chunk)
    leaf, matrix = make(kind)
    rng = np.random.default_rng(1)
    for shape in [(COLS,), (1, COLS), (3, COLS), (2, 5, COLS)]:
        x = rng.normal(size=shape).astype(np.float32)
        y = jax.jit(lambda x, leaf: x @ leaf)(x, leaf)
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, x @ matrix.T, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_product(kind):
    leaf, matrix = make(kind)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(6, COLS)), jnp.bfloat16)
    y = x @ leaf
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(y, np.float64), np.asarray(x, np.float64) @ matrix.T, atol=0.1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_exact_and_one_that_does_not_exist_is_nan(kind):
    leaf, matrix = make(kind)
    rows = leaf.take(jnp.array([[3, 0], [ROWS - 1, ROWS]]))
    assert rows.dtype == jnp.float32
    np.testing.assert_array_equal(rows[0], matrix[[3, 0]])
    np.testing.assert_array_equal(rows[1, 0], matrix[-1])
    assert np.isnan(rows[1, 1]).all()


def test_int8_rows_are_shared_not_copied():
    tensor = int8_rows(np.eye(4, dtype=np.float32))
    leaf = RowWeight.from_int8_rows(tensor)
    assert np.shares_memory(leaf.values, tensor.codes)
    assert np.shares_memory(leaf.scale, tensor.codebook.left)


def test_another_kind_of_tensor_raises():
    rows = int8_rows(np.eye(4, dtype=np.float32))
    scaled = dataclasses.replace(rows, row_scales=np.ones(4, np.float16))
    for tensor in (random_tensor("int8", 12, 8), scaled):
        with pytest.raises(NotImplementedError, match="not what int8_rows makes"):
            RowWeight.from_int8_rows(tensor)


def test_x_of_another_width_raises():
    with pytest.raises(ValueError, match=f"x has {COLS + 1} columns, the weight {COLS}"):
        jnp.ones((1, COLS + 1)) @ make("float32")[0]
