"""reseed: unused centroids are the best choice for the worst vectors, and nothing else changes."""

from functools import partial

import array_reference as ref
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.moves.recode import recode
from gptvq_jax.moves.refit import decode
from gptvq_jax.moves.reseed import reseed
from gptvq_jax.moves.residual import residual_of

GRID = GroupGrid(6, 7, 2, strip_rows=6, strip_cols=8)  # half of the last vector is padding
BOOKS, SIZE, VECTORS = 2, 8, 4
USED = [0, 1, 4, 5, 7], [1, 2, 3, 6]


@jax.jit
def run_reseed(weight, hessian, centroids, codes, scales):
    residual = residual_of(weight, decode(centroids, codes, scales, GRID), hessian)
    return reseed(residual, hessian, centroids, codes, scales, GRID)


@partial(jax.jit, static_argnames="passes")
def run_recode(weight, hessian, centroids, codes, scales, passes):
    residual = residual_of(weight, decode(centroids, codes, scales, GRID), hessian)
    found, _ = recode(
        residual, hessian, centroids, codes, scales, GRID, passes=passes, block_size=4
    )
    return found


def state(seed=0, used=USED, size=SIZE):
    """A random layer whose codes are some of those that there are."""
    rng = np.random.default_rng(seed)
    p = ref.problem(GRID.rows, GRID.cols, seed=seed)
    codes = [rng.choice(of_book, (VECTORS, GRID.rows)) for of_book in used]
    for of_book, chosen in zip(codes, used, strict=True):
        of_book.reshape(-1)[: len(chosen)] = chosen  # every one at least once
    scales = rng.choice([-1, 1], GRID.rows) * 2.0 ** rng.uniform(-3, 3, GRID.rows)
    return (
        GRID.pad_transpose(jnp.asarray(p.weight * scales[:, None], jnp.float32)),
        jnp.pad(jnp.asarray(p.hessian), ((0, 1), (0, 1))),
        jnp.asarray(rng.normal(size=(BOOKS, 1, 1, size, 2)), jnp.float32),
        jnp.asarray(np.stack(codes), jnp.int32),
        jnp.asarray(np.broadcast_to(scales, (VECTORS, GRID.rows)), jnp.float32),
    )


def errors(weight, centroids, codes, scales):
    """W - Q as vectors (rows, vectors, 2), float64, 0 in the padding."""
    books, codes = np.asarray(centroids, np.float64)[:, 0, 0], np.asarray(codes)
    quantized = sum(book[of_book] for book, of_book in zip(books, codes, strict=True))  # (J, r, D)
    quantized = quantized * np.asarray(scales, np.float64)[..., None]
    weight = np.asarray(weight, np.float64).reshape(VECTORS, 2, GRID.rows)
    error = np.swapaxes(weight, 1, 2) - quantized
    error[-1, :, 1] = 0
    return error


def loss(weight, hessian, centroids, codes, scales):
    error = np.swapaxes(errors(weight, centroids, codes, scales), 0, 1).reshape(GRID.rows, -1)
    return ref.loss(error, 0 * error, hessian)


def gains(weight, hessian, centroids, codes, scales):
    """{(position, row): G_P H_PP^-1 G_P^T}, most first: the most that a change of it can gain."""
    error = np.swapaxes(errors(weight, centroids, codes, scales), 0, 1).reshape(GRID.rows, -1)
    h = np.asarray(hessian, np.float64)
    gradient, found = error @ h, {}
    for j, r in np.ndindex(VECTORS, GRID.rows):
        p = slice(2 * j, min(2 * j + 2, GRID.cols))
        found[j, r] = gradient[r, p] @ np.linalg.solve(h[p, p], gradient[r, p])
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def gained(weight, hessian, centroids, codes, scales, book, k):
    """{(position, row): what the loss falls by if its code of this codebook becomes k}."""
    before = loss(weight, hessian, centroids, codes, scales)
    return {
        (j, r): before - loss(weight, hessian, centroids, codes.at[book, j, r].set(k), scales)
        for j, r in np.ndindex(VECTORS, GRID.rows)
    }


@pytest.mark.parametrize("seed", range(4))
def test_unused_centroids_gain_the_most_that_a_vector_can(seed):
    weight, hessian, centroids, codes, scales = state(seed)
    new = run_reseed(weight, hessian, centroids, codes, scales)
    assert new.shape == centroids.shape
    most = gains(weight, hessian, centroids, codes, scales)
    worst = list(most)
    for m in range(BOOKS):
        unused = [k for k in range(SIZE) if k not in USED[m]]
        np.testing.assert_array_equal(new[m, 0, 0, USED[m]], centroids[m, 0, 0, USED[m]])
        for n, k in enumerate(unused):  # the codebooks take turns
            vector = worst[n * BOOKS + m]
            reached = gained(weight, hessian, new, codes, scales, m, k)[vector]
            assert reached == pytest.approx(most[vector], rel=1e-3)
    assert loss(weight, hessian, new, codes, scales) == loss(
        weight, hessian, centroids, codes, scales
    )


def test_a_recode_uses_them_for_the_better():
    """After codes that no recode betters any more, because what is unused is far away."""
    weight, hessian, centroids, codes, scales = state()
    unused = [[k for k in range(SIZE) if k not in used] for used in USED]
    for m in range(BOOKS):
        centroids = centroids.at[m, 0, 0, jnp.array(unused[m])].set(1e3)
    codes = run_recode(weight, hessian, centroids, codes, scales, 30)
    before = loss(weight, hessian, centroids, codes, scales)
    same = run_recode(weight, hessian, centroids, codes, scales, 30)
    np.testing.assert_array_equal(same, codes)

    new = run_reseed(weight, hessian, centroids, codes, scales)
    codes = run_recode(weight, hessian, new, codes, scales, 30)
    assert loss(weight, hessian, new, codes, scales) < 0.8 * before
    for m in range(BOOKS):
        assert set(unused[m]) & set(np.unique(codes[m]))


def test_more_unused_centroids_than_vectors():
    """There are 24 vectors: every one has a centroid that is the best for it."""
    weight, hessian, centroids, codes, scales = state(used=([0], [0]), size=64)
    new = run_reseed(weight, hessian, centroids, codes, scales)
    most = gains(weight, hessian, centroids, codes, scales)
    vectors = set()
    for m in range(BOOKS):
        for k in range(1, 26):
            of_vectors = gained(weight, hessian, new, codes, scales, m, k)
            reached = {v for v in most if of_vectors[v] > most[v] * (1 - 1e-3)}
            assert reached
            vectors |= reached
    assert np.isfinite(new).all() and len(vectors) == VECTORS * GRID.rows
    np.testing.assert_array_equal(new[:, 0, 0, 0], centroids[:, 0, 0, 0])


def test_codebooks_in_full_use_stay():
    args = state(used=(range(SIZE), range(SIZE)))
    np.testing.assert_array_equal(run_reseed(*args), args[2])
