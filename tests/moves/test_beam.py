"""Beam search: optimal where that can be enumerated, and never worse than a narrower one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_recode_refit import loss_of, run_recode, state

from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.moves.beam import follow, search

fast_search = jax.jit(search, static_argnames="width")


def vector_problem(seed, books, size, rows=40, dim=3):
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(1, 1, dim, rows)) * 2
    centroids = rng.normal(size=(books, 1, size, dim))
    codes = rng.integers(0, size, (books, 1, rows))
    return tuple(map(jnp.asarray, (target, centroids, codes)))


def distances(target, books, lanes):
    """(L, r) squared distances of lanes (L, M, 1, r), float64."""
    target, books, lanes = (np.asarray(a) for a in (target, books, lanes))
    chosen = sum(np.asarray(books[m, 0], np.float64)[lanes[:, m, 0]] for m in range(len(books)))
    return np.sum((np.moveaxis(target[0], 1, 2) - chosen) ** 2, axis=-1)


def run_search(target, books, codes, width):
    return fast_search(target, books, codes, jnp.zeros((1, 1, target.shape[-1])), width=width)


@pytest.mark.parametrize("books, size, width", [(2, 6, 6), (3, 3, 9), (1, 9, 1), (1, 9, 4)])
def test_wide_search_of_one_vector_is_brute_force(books, size, width):
    """As many lanes as there are combinations of all codes but the last: none is dropped."""
    for seed in range(3):
        target, centroids, codes = vector_problem(seed, books, size)
        found = run_search(target, centroids, codes, width)
        every = np.array(list(itertools.product(range(size), repeat=books)))[:, :, None, None]
        every = np.broadcast_to(every, (*every.shape[:3], target.shape[-1]))
        best = distances(target, centroids, every).min(0)
        found = distances(target, centroids, found.codes).min(0)
        np.testing.assert_allclose(found, best, rtol=1e-4, atol=1e-6)


def test_lane_0_is_the_greedy_search_and_the_others_are_the_best_of_the_rest():
    target, centroids, codes = vector_problem(0, 3, 8)
    greedy = run_search(target, centroids, codes, 1).codes[0]
    lanes = run_search(target, centroids, codes, 4).codes
    np.testing.assert_array_equal(lanes[0], greedy)
    rest = distances(target, centroids, lanes)[1:]
    assert (np.diff(rest, axis=0) >= -1e-5).all()
    one_by_one = np.asarray(codes).copy()  # the greedy search, written out
    for m in range(3):
        trials = np.stack([one_by_one] * 8)
        trials[:, m] = np.arange(8)[:, None, None]
        one_by_one[m] = distances(target, centroids, trials).argmin(0)
    np.testing.assert_array_equal(greedy, one_by_one)


def test_lanes_that_do_not_exist_are_never_continued():
    target, centroids, codes = vector_problem(1, 2, 8)
    lanes = jnp.broadcast_to(target, (3, *target.shape[1:]))
    loss = jnp.array([1.0, jnp.inf, jnp.inf])[:, None, None] * jnp.ones((3, 1, 40))
    found = fast_search(lanes, centroids, codes, loss, width=3)
    np.testing.assert_array_equal(found.origin, 0)


def test_follow_by_hand():
    values = jnp.array([[10, 11], [20, 21], [30, 31]])[:, None]  # (L = 3, G = 1, r = 2)
    parent = jnp.array([[2, 0], [1, 1]])[:, None]
    np.testing.assert_array_equal(follow(values, parent)[:, 0], [[30, 11], [20, 21]])
    wide = jnp.stack([values, -values], axis=2)  # (L, G, 2, r)
    np.testing.assert_array_equal(follow(wide, parent, 2)[0, 0], [[30, 11], [-30, -11]])


PAIR = GroupGrid(50, 4, 2, strip_rows=50, strip_cols=4)  # 50 problems of two vectors


def test_recode_of_two_vectors_with_two_codebooks_is_brute_force():
    """Two centroids each: 16 combinations, of which 8 lanes times the last code reach all."""
    for seed in range(4):
        weight, hessian, centroids, codes, scales = state(PAIR, seed, books=2, size=2)
        found = run_recode(weight, hessian, centroids, codes, scales, grid=PAIR, beam=8)
        h, w = np.asarray(hessian, np.float64), np.asarray(weight, np.float64)
        books = np.asarray(centroids, np.float64)[:, 0, 0]
        s = np.repeat(np.asarray(scales, np.float64), 2, axis=0)  # (4, rows)
        losses = {}
        for a, b, c, d in itertools.product(range(2), repeat=4):
            vector = np.concatenate([books[0, a] + books[1, c], books[0, b] + books[1, d]])
            e = w - s * vector[:, None]
            losses[a, b, c, d] = np.sum(e * (h @ e), axis=0)
        best = np.min(list(losses.values()), axis=0)
        reached = [losses[tuple(found[:, :, r].reshape(-1).tolist())][r] for r in range(50)]
        np.testing.assert_allclose(reached, best, rtol=1e-4, atol=1e-5)


ROW = GroupGrid(40, 24, 3, strip_rows=20, strip_cols=12)


def row_losses(weight, hessian, centroids, codes, scales):
    """Loss of every row, float64."""
    from test_recode_refit import plain_decode

    error = np.asarray(ROW.unpad_transpose(weight), np.float64)
    error = error - plain_decode(centroids, codes, scales, ROW)
    h = np.asarray(hessian, np.float64)[: ROW.cols, : ROW.cols]
    return np.sum((error @ h) * error, axis=1)


@pytest.mark.parametrize("books", [1, 3])
def test_no_row_gets_worse_with_a_wider_beam(books):
    gains = []
    for seed in range(4):
        weight, hessian, centroids, codes, scales = state(ROW, seed, books=books)
        args = weight, hessian, centroids, codes, scales
        narrow, wide = (run_recode(*args, grid=ROW, beam=beam) for beam in (1, 4))
        narrow, wide = (
            row_losses(weight, hessian, centroids, found, scales) for found in (narrow, wide)
        )
        assert (wide <= narrow * (1 + 1e-5) + 1e-5).all()
        gains.append(wide.sum() / narrow.sum())
    assert np.mean(gains) < 0.99


def test_lanes_are_independent_of_the_lazy_block():
    """Paths through several blocks are put together as within one."""
    weight, hessian, centroids, codes, scales = state(ROW, 7, books=2)
    from gptvq_jax.moves.recode import recode
    from gptvq_jax.moves.refit import decode
    from gptvq_jax.moves.residual import residual_of

    residual = residual_of(weight, decode(centroids, codes, scales, ROW), hessian)
    losses = [
        loss_of(
            weight,
            hessian,
            centroids,
            recode(residual, hessian, centroids, codes, scales, ROW, beam=3, block_size=size)[0],
            scales,
            ROW,
        )
        for size in (3, 6, 12)
    ]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)
