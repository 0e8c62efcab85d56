"""hessian: second moment, damping, dead columns, the factor U of the inverse."""

import array_reference as ref
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gptvq_jax.core.hessian import (
    add_inputs,
    add_products,
    asymmetric_target,
    damp,
    factorize,
    init_moment,
    inverse_cholesky,
    mean,
    mean_product,
    power_of_two,
    tile_size,
    unit,
    zero_dead,
)
from gptvq_jax.core.metrics import loss_of_any_size, quadratic_loss, relative_error, sqnr_db
from gptvq_jax.core.products import BFLOAT16, BFLOAT16X3, FLOAT32


def test_mean_over_all_tokens_of_all_batches():
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=shape).astype(np.float32) for shape in [(2, 5, 6), (7, 6), (6,)]]
    moment = init_moment(6)
    for batch in batches:
        moment = add_inputs(moment, jnp.asarray(batch))
    tokens = np.concatenate([b.reshape(-1, 6) for b in batches]).astype(np.float64)
    assert moment.count == len(tokens) == 18
    expected = np.mean([np.outer(x, x) for x in tokens], axis=0)
    np.testing.assert_allclose(mean(moment), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mean(moment), mean(moment).T)


def test_bfloat16_inputs_are_summed_in_float32():
    x = jnp.full((1000, 2), 1.0, jnp.bfloat16)
    moment = add_inputs(add_inputs(init_moment(2), x), x)
    assert moment.total.dtype == jnp.float32
    np.testing.assert_array_equal(moment.total[np.triu_indices(2)], 2000.0)
    np.testing.assert_array_equal(mean(moment), np.ones((2, 2)))


@pytest.mark.parametrize("cols", [1, 3, 7, 8, 22])  # in tiles of 1, 1, 2, 2 and 6
@pytest.mark.parametrize("weighted", [False, True])
def test_tiles_above_the_diagonal_are_those_of_the_whole_product(cols, weighted):
    """Integers, whose sums are exact; of tiles below the diagonal nothing is computed."""
    rng = np.random.default_rng(cols)
    x = rng.integers(-8, 8, (3, 50, cols)).astype(np.float32)
    weights = rng.integers(0, 5, (3, 50)).astype(np.float32) if weighted else None
    of_batch = np.ones((3, 50)) if weights is None else weights
    moment = init_moment(cols)
    for k in range(3):
        of_k = None if weights is None else weights[k]
        moment = add_inputs(moment, x[k], of_k)
    whole = np.einsum("bt,bti,btj->ij", of_batch, x, x)
    upper, size = np.triu_indices(cols), tile_size(cols)
    np.testing.assert_array_equal(moment.total[upper], whole[upper])
    tile = np.arange(cols) // size
    assert not np.asarray(moment.total)[tile[:, None] > tile].any()
    np.testing.assert_allclose(mean(moment), whole / of_batch.sum(), rtol=1e-6)
    np.testing.assert_array_equal(mean(moment), mean(moment).T)


def weighted_batches():
    """Inputs x, other inputs y and token weights of three batches; some weights are 0."""
    rng = np.random.default_rng(1)
    for shape in [(2, 5, 6), (7, 6), (6,)]:
        x, y = rng.normal(size=(2, *shape)).astype(np.float32)
        weights = rng.lognormal(sigma=2, size=shape[:-1]) * (rng.random(shape[:-1]) > 0.2)
        yield x, y, weights.astype(np.float32)


def test_weighted_means_in_float64():
    batches = list(weighted_batches())
    moment = cross = init_moment(6)
    for x, y, weights in batches:
        moment = add_inputs(moment, jnp.asarray(x), jnp.asarray(weights))
        cross = add_products(cross, jnp.asarray(x), jnp.asarray(y), jnp.asarray(weights))
    x, y = (
        np.concatenate([b[k].reshape(-1, 6) for b in batches]).astype(np.float64) for k in (0, 1)
    )
    weights = np.concatenate([b[2].reshape(-1) for b in batches]).astype(np.float64)
    np.testing.assert_allclose(moment.count, weights.sum(), rtol=1e-6)
    expected = np.einsum("t,ti,tj->ij", weights, x, x) / weights.sum()
    np.testing.assert_allclose(mean(moment), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mean(moment), mean(moment).T)
    expected = np.einsum("t,ti,tj->ij", weights, x, y) / weights.sum()
    np.testing.assert_allclose(mean_product(cross), expected, rtol=1e-5, atol=1e-6)


def test_weights_of_one_change_nothing():
    weighted = plain = init_moment(6)
    for x, y, _ in weighted_batches():
        weighted = add_products(weighted, jnp.asarray(x), jnp.asarray(y), jnp.ones(x.shape[:-1]))
        plain = add_products(plain, jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_array_equal(weighted.total, plain.total)
    assert weighted.count == plain.count == 18


def test_mean_of_nothing_is_zero():
    np.testing.assert_array_equal(mean(init_moment(3)), np.zeros((3, 3)))


def test_damping_is_a_fraction_of_the_mean_diagonal():
    h = np.array([[2.0, 1.0], [1.0, 4.0]], np.float32)
    np.testing.assert_allclose(damp(jnp.asarray(h), 0.1), h + 0.3 * np.eye(2), rtol=1e-6)
    weight = jnp.ones((3, 2))
    np.testing.assert_array_equal(zero_dead(weight, h), weight)


def test_dead_columns_get_zero_weight_and_only_damping():
    h = np.zeros((3, 3), np.float32)
    h[np.ix_([0, 2], [0, 2])] = [[2.0, 1.0], [1.0, 4.0]]
    np.testing.assert_array_equal(zero_dead(jnp.ones((2, 3)), h), [[1, 0, 1], [1, 0, 1]])
    for damping, of_live, of_dead in [(0.01, 0.03, 0.03), (0.0, 0.0, 3.0)]:  # the live mean is 3
        damped = damp(jnp.asarray(h), damping)
        np.testing.assert_allclose(damped, h + np.diag([of_live, of_dead, of_live]), rtol=1e-6)
        assert np.isfinite(inverse_cholesky(damped)).all()


def test_dead_columns_do_not_change_how_the_others_are_damped():
    live = ref.problem(1, 6).hessian
    h = np.zeros((9, 9), np.float32)
    at = [0, 2, 3, 5, 6, 8]
    h[np.ix_(at, at)] = live
    u = np.array(factorize(jnp.asarray(h), 0.01).hinv_chol)
    expected = factorize(jnp.asarray(live), 0.01).hinv_chol
    np.testing.assert_allclose(u[np.ix_(at, at)], expected, rtol=1e-5, atol=1e-6)
    u[np.ix_(at, at)] = 0
    np.testing.assert_allclose(u, np.diag(np.diag(u)))  # a dead column is no one's neighbour


def test_all_dead_is_a_multiple_of_the_identity():
    h = jnp.zeros((3, 3))
    np.testing.assert_allclose(damp(h, 0.01), 0.01 * np.eye(3))
    np.testing.assert_array_equal(damp(h, 0.0), np.eye(3))
    np.testing.assert_allclose(factorize(h, 0.01).hinv_chol, 10 * np.eye(3), rtol=1e-6)
    assert not zero_dead(jnp.ones((2, 3)), h).any()


@pytest.mark.parametrize("exponent", [-110, -41, -1, 1, 40, 110])
def test_the_unit_of_the_hessian_changes_no_bit(exponent):
    p = ref.problem(1, 8)
    h, scale = p.hessian * (np.arange(8) != 3) * (np.arange(8) != 3)[:, None], 2.0**exponent
    scaled = jnp.asarray(h * np.float32(scale))
    assert float(unit(scaled)) == float(unit(h)) * scale
    one, other = factorize(jnp.asarray(h), 0.01), factorize(scaled, 0.01)
    np.testing.assert_array_equal(one.hinv_chol, other.hinv_chol)
    w, shift = jnp.ones((2, 8)), jnp.asarray(-0.1 * h.sum(axis=0) * np.ones((2, 1)), jnp.float32)
    np.testing.assert_array_equal(
        asymmetric_target(w, h, shift, one.hinv_chol, 1.0),
        asymmetric_target(w, scaled, shift * scale, other.hinv_chol, 1.0),
    )


def test_power_of_two():
    sizes = [0.0, 1.0, 1.5, 2.0, 0.99, 2.0**-126, 2.0**127, 3e38]
    expected = [1.0, 1.0, 1.0, 2.0, 0.5, 2.0**-126, 2.0**127, 2.0**127]
    np.testing.assert_array_equal(power_of_two(jnp.array(sizes)), np.float32(expected))


def test_losses_beyond_the_squares_of_float32():
    p = ref.problem(5, 8)
    q = np.round(p.weight * 2) / 2
    expected = ref.loss(p.weight, q, p.hessian)
    for of_weight, of_hessian in [(2.0**80, 2.0**90), (2.0**-80, 2.0**-90), (1.0, 1.0)]:
        arrays = p.weight * of_weight, q * of_weight, p.hessian * of_hessian
        loss = loss_of_any_size(*(jnp.asarray(a, jnp.float32) for a in arrays))
        assert loss == pytest.approx(expected * of_weight**2 * of_hessian, rel=1e-5)


def test_low_rank_hessian_is_positive_definite_once_damped():
    x = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    hinv_chol, damping = factorize(jnp.asarray(x.T @ x / 3), 0.01)
    assert np.isfinite(hinv_chol).all() and damping == 0.01


def test_factorize_is_the_factor_of_the_damped_hessian():
    p = ref.problem(1, 8)
    hinv_chol, damping = factorize(jnp.asarray(p.hessian), 0.01)
    assert damping == 0.01
    expected = p.hinv_chol * float(unit(p.hessian)) ** 0.5  # of the H whose diagonal reaches 1 to 2
    np.testing.assert_allclose(hinv_chol, expected, atol=1e-4 * np.abs(expected).max())


def test_factorize_raises_damping_tenfold_until_it_is_enough(caplog):
    h = jnp.array([[1.0, 1.003], [1.003, 1.0]])  # lowest eigenvalue -0.003
    hinv_chol, damping = factorize(h, 0.0002, "layer 3")
    np.testing.assert_allclose(damping, 0.02, rtol=1e-6)  # 0.002 is too little
    assert np.isfinite(hinv_chol).all()
    assert "layer 3" in caplog.text and "0.02" in caplog.text


def test_factorize_starts_from_no_damping():
    hinv_chol, damping = factorize(jnp.eye(2), 0.0)
    assert damping == 0.0
    np.testing.assert_array_equal(hinv_chol, np.eye(2))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_factorize_rejects_a_hessian_that_is_not_finite(bad):
    with pytest.raises(ValueError, match="layer 3.*NaN or infinite"):
        factorize(jnp.array([[1.0, 0.0], [0.0, bad]]), 0.01, "layer 3")


def test_factorize_gives_up_on_a_hopeless_hessian():
    with pytest.raises(ValueError, match="layer 3"):
        factorize(jnp.array([[1.0, 9.0], [9.0, 1.0]]), 0.01, "layer 3")


def test_inverse_cholesky_against_float64():
    damped = ref.problem(1, 24).damped
    u = np.asarray(inverse_cholesky(jnp.asarray(damped)))
    np.testing.assert_array_equal(u, np.triu(u))
    assert (np.diag(u) > 0).all()
    expected = ref.inverse_cholesky(damped)
    np.testing.assert_allclose(u, expected, atol=2e-4 * np.abs(expected).max())
    with jax.enable_x64(True):
        h = jnp.asarray(damped.astype(np.float64))
        u = np.asarray(inverse_cholesky(h))
        assert u.dtype == np.float64
        np.testing.assert_allclose(u.T @ u @ h, np.eye(24), atol=1e-10)
        np.testing.assert_allclose(u, expected, rtol=1e-8, atol=1e-10)


def test_inverse_cholesky_by_hand():
    # H = [[1, 1/2], [1/2, 1]]: H^-1 = 4/3 [[1, -1/2], [-1/2, 1]]
    u = inverse_cholesky(jnp.array([[1.0, 0.5], [0.5, 1.0]]))
    np.testing.assert_allclose(u, [[2 / 3**0.5, -1 / 3**0.5], [0, 1]], rtol=1e-6)


@pytest.mark.parametrize("h", [[[1.0, 2.0], [2.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]])
def test_not_positive_definite_gives_nan(h):
    assert not np.isfinite(inverse_cholesky(jnp.array(h))).all()


def test_metrics_against_float64():
    p = ref.problem(5, 8)
    q = np.round(p.weight * 2) / 2
    expected = ref.loss(p.weight, q, p.hessian)
    np.testing.assert_allclose(quadratic_loss(p.weight, q, p.hessian), expected, rtol=1e-5)
    relative = expected / ref.loss(p.weight, 0 * q, p.hessian)
    np.testing.assert_allclose(relative_error(p.weight, q, p.hessian), relative, rtol=1e-5)
    assert relative_error(p.weight, p.weight, p.hessian) == 0
    np.testing.assert_allclose(relative_error(p.weight, 0 * q, p.hessian), 1, rtol=1e-6)
    assert relative_error(p.weight, q, 0 * p.hessian) == 0
    np.testing.assert_allclose(sqnr_db(0.01), 20, rtol=1e-6)


def test_asymmetric_target_minimises_the_output_error_on_other_inputs():
    """W* is the float64 least-squares solution of |W x - Q y|^2 over Q, and strength 0 is W."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(200, 6))
    y = x + 0.3 * rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
    weight = rng.normal(size=(4, 6))
    hessian, cross = y.T @ y / 200, x.T @ y / 200
    expected = np.linalg.lstsq(y, x @ weight.T, rcond=None)[0].T
    shift = weight @ (cross - hessian)
    args = [jnp.asarray(a, jnp.float32) for a in (weight, hessian, shift)]
    hinv_chol = factorize(args[1], 0.0).hinv_chol
    target = asymmetric_target(*args, hinv_chol, 1.0)
    np.testing.assert_allclose(target, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(asymmetric_target(*args, hinv_chol, 0.0), args[0])


def in_float64(batches, rounding=lambda x: x):
    """Means of w x x^T and w x y^T, where the roots of weights are in what is rounded."""
    x, y = (np.concatenate([b[k].reshape(-1, 6) for b in batches]) for k in (0, 1))
    weights = np.concatenate([b[2].reshape(-1) for b in batches])
    root = np.sqrt(weights)[:, None]
    x, y = (rounding(values * root).astype(np.float64) for values in (x, y))
    return x.T @ x / weights.sum(dtype=np.float64), x.T @ y / weights.sum(dtype=np.float64)


@pytest.mark.parametrize("products", [BFLOAT16, BFLOAT16X3])
def test_means_of_rounded_inputs_in_float64(products):
    batches = list(weighted_batches())
    moment, cross = init_moment(6, products=products), init_moment(6, 6, products)
    for x, y, weights in batches:
        moment, cross = add_inputs(moment, x, weights), add_products(cross, x, y, weights)
    assert moment.products == cross.products == products
    to_bfloat16 = lambda x: x.astype(ml_dtypes.bfloat16)  # noqa: E731
    expected = in_float64(batches, *[to_bfloat16] * (products == BFLOAT16))
    for found, of in zip((mean(moment), mean_product(cross)), expected, strict=True):
        np.testing.assert_allclose(found, of, rtol=1e-4, atol=1e-4 * np.abs(of).max())
    exact, _ = in_float64(batches)
    error = np.abs(mean(moment) - exact).max() / np.abs(exact).max()
    assert (2.0**-16 < error < 2.0**-7) if products == BFLOAT16 else error < 2.0**-15


def test_a_hessian_of_bfloat16_inputs_is_of_many_tokens_summed_in_float32():
    """A sum in bfloat16 would stop at 256; and that of some inputs is positive semidefinite."""
    x = np.random.default_rng(3).normal(1.0, 0.3, (2, 4096, 5)).astype("f")
    weights = np.random.default_rng(4).random((2, 4096)).astype("f")
    moment = init_moment(5, products=BFLOAT16)
    for batch, of_batch in zip(x, weights, strict=True):
        moment = add_inputs(moment, batch, of_batch)
    found = np.asarray(mean(moment), np.float64)
    expected = np.einsum("nt,nti,ntj->ij", weights, x, x, dtype=np.float64) / weights.sum()
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert np.linalg.eigvalsh(found).min() > 0


@pytest.mark.parametrize("products, most", [(FLOAT32, 1e-5), (BFLOAT16X3, 1e-4)])
def test_the_asymmetric_target_in_float64(products, most):
    """Of correlated inputs; the damping is that of a run."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(200, 24)) @ rng.normal(size=(24, 24))
    hessian = (x.T @ x / 200).astype("f")
    factor = factorize(jnp.asarray(hessian), 0.01)
    weight, shift = rng.normal(size=(2, 7, 24)).astype("f")
    u, power = np.asarray(factor.hinv_chol, np.float64), float(unit(jnp.asarray(hessian)))
    moved = 0.25 * (shift.astype(np.float64) / power) @ u.T @ u
    found = asymmetric_target(weight, hessian, shift, factor.hinv_chol, 0.25, products)
    error = np.abs(np.asarray(found, np.float64) - weight - moved)
    assert error.max() < most * max(np.abs(moved).max(), 1)


def test_losses_are_float32_whatever_the_weights_are():
    rng = np.random.default_rng(6)
    weight, quantized = rng.normal(size=(2, 5, 8)).astype(ml_dtypes.bfloat16)
    hessian = np.eye(8, dtype=np.float32) * 3
    loss = quadratic_loss(jnp.asarray(weight), jnp.asarray(quantized), jnp.asarray(hessian))
    error = weight.astype(np.float64) - quantized.astype(np.float64)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 3 * (error**2).sum(), rtol=1e-6)
