"""products: what a name says, against float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gptvq_jax.core.products import BFLOAT16, BFLOAT16X3, FLOAT32, PRODUCTS, matmul

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(9, 700)).astype("f"), RNG.normal(size=(700, 11)).astype("f")
SIZE = np.abs(X).astype(np.float64) @ np.abs(Y)  # of the terms of each sum


def rounded(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "products, least, most",
    [(FLOAT32, 0, 2.0**-20), (BFLOAT16X3, 2.0**-24, 2.0**-16), (BFLOAT16, 2.0**-14, 2.0**-8)],
)
def test_errors_are_those_that_the_name_promises(products, least, most, compiled):
    multiply = jax.jit(matmul, static_argnames="products") if compiled else matmul
    found = multiply(X, Y, products=products)
    assert found.dtype == jnp.float32
    error = np.abs(np.asarray(found, np.float64) - X.astype(np.float64) @ Y) / SIZE
    assert least < error.max() < most


def test_bfloat16_products_are_those_of_rounded_numbers_summed_in_float32():
    expected = rounded(X) @ rounded(Y)
    np.testing.assert_allclose(matmul(X, Y, BFLOAT16), expected, rtol=0, atol=1e-6 * SIZE.max())


def test_three_products_are_those_of_two_halves_without_the_smallest():
    """Beside zeros, the sum of the other three terms is all there is."""
    x = np.float32([[1 + 2.0**-9 + 2.0**-16]])
    first = rounded(x)
    second = rounded(x - first.astype("f"))
    expected = first * first + 2 * first * second
    assert second[0, 0] != 0
    np.testing.assert_allclose(matmul(x, x, BFLOAT16X3), expected, rtol=2.0**-23)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="products='fp8' must be one of float32, bfloat16, bfl"):
        matmul(X, Y, "fp8")
    assert PRODUCTS == (FLOAT32, BFLOAT16, BFLOAT16X3)
