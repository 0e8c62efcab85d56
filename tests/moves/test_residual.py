"""Residuals that are carried from move to move are those of where the moves have led."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_recode_refit import GRIDS, SIZE, assert_residual, loss_of, state

from gptvq_jax.moves.recode import recode
from gptvq_jax.moves.refit import codebook_loss, decode, refit
from gptvq_jax.moves.residual import residual_of


@partial(jax.jit, static_argnames=("grid", "beam"))
def recoded(residual, hessian, centroids, codes, scales, grid, beam, passes):
    moved = recode(residual, hessian, centroids, codes, scales, grid, beam=beam, passes=passes)
    return centroids, *moved


@partial(jax.jit, static_argnames="grid")
def refitted(residual, hessian, centroids, codes, scales, grid, iterations):
    centroids, residual = refit(residual, hessian, centroids, codes, scales, grid, iterations)
    return centroids, codes, residual


@partial(jax.jit, static_argnames="grid")
def rounded(residual, hessian, centroids, codes, scales, grid, step):
    """Centroids as multiples of a step, as compression moves them."""
    change = step * jnp.round(centroids / step) - centroids
    quantized = decode(change, codes, scales, grid)
    return centroids + change, codes, residual.moved(quantized, hessian)


MOVES = [
    partial(recoded, beam=1, passes=1),
    partial(recoded, beam=1, passes=3),
    partial(recoded, beam=3, passes=2),
    partial(refitted, iterations=0),
    partial(refitted, iterations=2),
    partial(refitted, iterations=30),
    partial(rounded, step=0.1),
    partial(rounded, step=1.5),
]


@pytest.mark.parametrize("dim, books, scaled", [(2, 1, True), (3, 1, False), (3, 2, True)])
@pytest.mark.parametrize("rank", [3, 400])
def test_after_any_sequence_of_moves(dim, books, scaled, rank):
    grid = GRIDS[dim]
    for seed in range(4):
        weight, hessian, centroids, codes, scales = state(grid, seed, rank, scaled, books)
        residual = residual_of(weight, decode(centroids, codes, scales, grid), hessian)
        states = [(centroids, codes, scales)]
        for move in np.random.default_rng(seed).permutation(2 * MOVES):
            centroids, codes, residual = move(
                residual, hessian, centroids, codes, scales, grid=grid
            )
            states.append((centroids, codes, scales))
            assert_residual(residual, weight, hessian, states, grid)
        assert len({np.asarray(codes).tobytes() for _, codes, _ in states}) > 1


def test_loss_and_gradient():
    """L = tr(E^T H E) of a tall matrix, and -2 H E its derivative."""
    grid = GRIDS[2]
    weight, hessian, centroids, codes, scales = state(grid, 0)
    quantized = decode(centroids, codes, scales, grid)
    residual = residual_of(weight, quantized, hessian)
    expected = loss_of(weight, hessian, centroids, codes, scales, grid)
    np.testing.assert_allclose(residual.loss, expected, rtol=1e-5)
    gradient = jax.grad(codebook_loss, argnums=1)(weight, quantized, hessian)
    size = np.abs(gradient).max()
    np.testing.assert_allclose(-2 * residual.image, gradient, atol=1e-5 * size)


def test_nothing_is_left_of_an_exact_copy():
    grid = GRIDS[3]
    _, hessian, centroids, codes, scales = state(grid, 1)
    exact = decode(centroids, codes, scales, grid)
    residual = residual_of(exact, exact, hessian)
    for move in MOVES[:-2]:
        same, same_codes, after = move(residual, hessian, centroids, codes, scales, grid=grid)
        np.testing.assert_array_equal(same, centroids)
        assert not after.error.any() and not after.image.any() and after.loss == 0
        assert same_codes.max() < SIZE
