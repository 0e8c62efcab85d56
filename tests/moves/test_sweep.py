"""sweep: codes, loss and weights of the float64 reference, and a problem worked by hand."""

from functools import partial

import array_reference as ref
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.moves.scales import normalize_strip
from gptvq_jax.moves.sweep import pad_identity, sweep

# 7 rows in strips of 3 and 22 columns in strips of 8 (or 9): both axes are padded, and with dim=3
# the last vector is cut by the edge.
ROWS, COLS = 7, 22


def grid_of(dim: int) -> GroupGrid:
    return GroupGrid(ROWS, COLS, dim, strip_rows=3, strip_cols=9 if dim == 3 else 8)


def run(weight, hinv_chol, book, mix, *, grid, block_size=4, exact_metric=True, scale_block_size=0):
    """`jitted` with every setting spelled out: jit compiles anew for one that is left out."""
    arrays = weight, hinv_chol, book, jnp.float32(mix)
    return jitted(*arrays, grid, block_size, exact_metric, scale_block_size)


@partial(jax.jit, static_argnums=(4, 5, 6, 7))
def jitted(weight, hinv_chol, book, mix, grid, block_size, exact_metric, scale_block_size):
    """Sweeps with the codebook `book` + mix * (vectors of the group's first row), (J, D).

    With mix != 0 the codebooks show what the sweep hands to `fit`.
    """

    def fit(data, keys):
        del keys
        return book + mix * data.points[..., 0]  # (G, J, D)

    normalize = None
    if scale_block_size:
        normalize = partial(normalize_strip, block_size=scale_block_size)
    result = sweep(
        grid.pad_transpose(weight),
        pad_identity(hinv_chol, grid),
        grid,
        fit,
        jax.random.key(0),
        block_size=block_size,
        exact_metric=exact_metric,
        normalize=normalize,
    )
    codes = result.codes[: grid.num_vectors, : grid.rows].T
    return codes, grid.unpad_transpose(result.quantized), result.loss, result.centroids


def reference(weight, hinv_chol, book, mix, *, grid, exact_metric=True, scale_block_size=0):
    def fit(group, scales, u, strip, g):
        first = np.zeros(grid.strip_cols)
        first[: group.shape[1]] = group[0] / scales[0]
        return book + mix * first.reshape(-1, grid.dim)

    scale = partial(ref.block_scales, block_size=scale_block_size) if scale_block_size else None
    return ref.sweep(weight, hinv_chol, grid, fit, exact_metric=exact_metric, scale=scale)


def book_of(grid, seed=0):
    book = np.random.default_rng(seed).normal(size=(grid.strip_vectors, grid.dim))
    return book.astype(np.float32)


SETTINGS = [
    dict(dim=2, block_size=4),
    dict(dim=2, block_size=8, exact_metric=False),
    dict(dim=3, block_size=3),
    dict(dim=1, block_size=8, scale_block_size=4),  # rows of padding must not widen the scales
]


@pytest.mark.parametrize("kw", SETTINGS)
def test_against_float64(kw):
    kw = dict(kw)
    grid, block_size = grid_of(kw.pop("dim")), kw.pop("block_size")
    p, book = ref.problem(ROWS, COLS, seed=3), 0.5 * book_of(grid)
    for mix in (0.0, 0.8):
        expected = reference(p.weight, p.hinv_chol, book, mix, grid=grid, **kw)
        codes, quantized, loss, centroids = run(
            p.weight, p.hinv_chol, book, mix, grid=grid, block_size=block_size, **kw
        )
        np.testing.assert_array_equal(codes, expected.codes)
        assert len(np.unique(codes)) >= 3
        np.testing.assert_allclose(quantized, expected.quantized, atol=2e-3)
        for (strip, group), expected_book in expected.codebooks.items():
            np.testing.assert_allclose(centroids[strip, group], expected_book, atol=2e-3)
        np.testing.assert_allclose(loss, expected.loss, rtol=1e-3)
        # sum |E|^2 is the loss in the damped Hessian, with feedback across strips and all.
        np.testing.assert_allclose(loss, ref.loss(p.weight, quantized, p.damped), rtol=1e-3)


def test_exact_and_diagonal_metric_differ():
    """Each equals its own reference above; here they are not the same thing."""
    grid, p = grid_of(2), ref.problem(ROWS, COLS, seed=3)
    book = book_of(grid)
    exact = run(p.weight, p.hinv_chol, book, 0.0, grid=grid)[0]
    diagonal = run(p.weight, p.hinv_chol, book, 0.0, grid=grid, block_size=8, exact_metric=False)[0]
    assert (exact != diagonal).any()


def test_block_size_changes_nothing():
    grid, p = grid_of(2), ref.problem(ROWS, COLS, seed=5)
    args = p.weight, p.hinv_chol, book_of(grid), 0.5
    codes, quantized, loss, _ = run(*args, grid=grid, block_size=4)
    other = run(*args, grid=grid, block_size=1)  # one vector per block, the least there is
    np.testing.assert_array_equal(codes, other[0])
    np.testing.assert_allclose(quantized, other[1], atol=1e-4)
    np.testing.assert_allclose(loss, other[2], rtol=1e-4)


def test_permuting_rows_permutes_the_result():
    grid, p = grid_of(2), ref.problem(ROWS, COLS, seed=6)
    order = np.random.default_rng(0).permutation(ROWS)
    args = p.hinv_chol, book_of(grid), 0.0
    codes, quantized, loss, _ = run(p.weight, *args, grid=grid)
    permuted = run(p.weight[order], *args, grid=grid)
    np.testing.assert_array_equal(codes[order], permuted[0])
    np.testing.assert_array_equal(quantized[order], permuted[1])
    np.testing.assert_allclose(loss, permuted[2], rtol=1e-6)


def test_identity_rounds_to_nearest():
    grid, p, book = grid_of(2), ref.problem(ROWS, COLS), book_of(grid_of(2))
    codes, quantized, loss, _ = run(p.weight, np.eye(COLS, dtype=np.float32), book, 0.0, grid=grid)
    vectors = p.weight.reshape(ROWS, -1, 1, 2)
    expected = np.square(vectors - book).sum(-1).argmin(-1)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(quantized, book[expected].reshape(ROWS, COLS))
    np.testing.assert_allclose(
        loss, np.sum((p.weight - book[expected].reshape(ROWS, -1)) ** 2), 1e-5
    )


def test_feedback_beats_no_feedback():
    grid, wins = grid_of(2), 0
    for seed in range(8):
        p, book = ref.problem(ROWS, COLS, seed=seed), book_of(grid, seed)
        _, fed, _, _ = run(p.weight, p.hinv_chol, book, 0.0, grid=grid)
        _, plain, _, _ = run(p.weight, np.eye(COLS, dtype=np.float32), book, 0.0, grid=grid)
        wins += ref.loss(p.weight, fed, p.damped) < ref.loss(p.weight, plain, p.damped)
    assert wins >= 7


def test_two_columns_by_hand():
    # H = [[1, 1/2], [1/2, 1]], w = (0.6, 0.6), codebook {0, 1}. Column 0 goes to 1, an error of
    # -0.4; its best compensation moves column 1 by -0.4 / 2 to 0.4, which goes to 0. The loss of
    # errors (-0.4, 0.6) is 0.16 + 0.36 - 0.24 = 0.28; rounding both up would cost 0.48.
    grid = GroupGrid(1, 2, 1, 1, 2)
    u = ref.inverse_cholesky(np.array([[1, 0.5], [0.5, 1]])).astype(np.float32)
    book = np.array([[0.0], [1.0]], np.float32)
    weight = np.array([[0.6, 0.6]], np.float32)
    codes, quantized, loss, _ = run(weight, u, book, 0.0, grid=grid)
    np.testing.assert_array_equal(codes, [[1, 0]])
    np.testing.assert_array_equal(quantized, [[1, 0]])
    np.testing.assert_allclose(loss, 0.28, rtol=1e-5)


def test_fit_sees_no_weight_on_padding():
    """`fit` returns how many vectors weigh something: those of the matrix, group by group."""
    grid, p = GroupGrid(5, 20, 2, strip_rows=3, strip_cols=8), ref.problem(5, 20)

    def fit(data, keys):
        return jnp.sum(data.weight > 0, axis=(1, 2)).astype(jnp.float32)[:, None, None] * jnp.ones(
            (1, 2)
        )

    counts = jax.jit(
        lambda w, u: sweep(
            grid.pad_transpose(w), pad_identity(u, grid), grid, fit, jax.random.key(0)
        ).centroids[:, :, 0, 0]
    )(p.weight, p.hinv_chol)
    # 4, 4 and 2 vectors in a row of each column strip; 3 and 2 rows
    np.testing.assert_array_equal(counts, [[12, 8], [12, 8], [6, 4]])


def drawn(first_strip, rows):
    """What each group of a sweep draws from its key, (S, G)."""
    grid = GroupGrid(rows, 20, 2, strip_rows=3, strip_cols=8)

    def fit(data, keys):
        assert keys.shape == (grid.row_strips,)
        numbers = jax.vmap(jax.random.uniform)(keys)
        return jnp.broadcast_to(numbers[:, None, None], (len(keys), 4, 2))

    def swept(weight, first_strip):
        key, u = jax.random.key(0), jnp.eye(grid.padded_cols)
        return sweep(weight, u, grid, fit, key, first_strip=first_strip).centroids[:, :, 0, 0]

    return np.asarray(jax.jit(swept)(jnp.ones((grid.padded_cols, grid.padded_rows)), first_strip))


def test_every_group_draws_its_own_and_a_part_what_the_whole_would():
    whole = drawn(0, 14)
    assert whole.shape == (3, 5) and len(np.unique(whole)) == 15
    np.testing.assert_array_equal(drawn(0, 6), whole[:, :2])
    np.testing.assert_array_equal(drawn(2, 9), whole[:, 2:])


def test_traced_program_does_not_grow_with_columns():
    def size(cols):
        grid = GroupGrid(4, cols, 2, strip_rows=2, strip_cols=16)
        return ref.count_equations(
            lambda w, u, b: run(w, u, b, 0.5, grid=grid),
            *(jnp.zeros(s) for s in [(4, cols), (cols, cols), (8, 2)]),
        )

    assert size(64) == size(512) > 50
