"""A rotated layer is the same layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard

from gptvq_jax.core import metrics
from gptvq_jax.study.rotation import random_hadamard, random_rotation, rotate, rotate_back


@pytest.mark.parametrize("size", [1, 2, 8, 9, 24])
def test_the_matrices_are_orthogonal(size):
    matrix = random_hadamard(size, np.random.default_rng(0))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)


def test_of_a_power_of_two_it_is_a_hadamard_matrix_with_signs():
    matrix = random_hadamard(8, np.random.default_rng(0)) * np.sqrt(8)
    signs = np.round(matrix[0], 12)
    assert set(signs) == {-1.0, 1.0}
    np.testing.assert_allclose(matrix * signs, hadamard(8), atol=1e-12)


def test_losses_are_those_of_the_layer():
    rng = np.random.default_rng(0)
    weight, quantized = (jnp.asarray(rng.normal(size=(24, 40)), jnp.float32) for _ in range(2))
    x = jnp.asarray(rng.normal(size=(64, 40)), jnp.float32)
    hessian, rotation = x.T @ x / 64, random_rotation(24, 40, seed=1)
    turned_weight, turned_hessian = rotate(weight, hessian, rotation)
    turned, _ = rotate(quantized, hessian, rotation)
    assert metrics.relative_error(turned_weight, turned, turned_hessian) == pytest.approx(
        float(metrics.relative_error(weight, quantized, hessian)), rel=1e-4
    )
    np.testing.assert_allclose(rotate_back(turned_weight, rotation), weight, atol=1e-5)
    np.testing.assert_array_equal(turned_hessian, turned_hessian.T)


def test_an_outlier_is_spread():
    weight = jnp.zeros((64, 48)).at[3, 5].set(1.0)
    turned, _ = rotate(weight, jnp.eye(48), random_rotation(64, 48, seed=0))
    assert float(jnp.max(jnp.abs(turned))) < 0.06
    assert jax.tree.leaves(turned)[0].dtype == jnp.float32
