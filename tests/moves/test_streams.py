"""Sweep and recode with trellis codes: losses, feedback, outliers and scales."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.core.hessian import inverse_cholesky
from gptvq_jax.core.metrics import quadratic_loss
from gptvq_jax.core.trellis_table import gaussian_levels, gaussian_values
from gptvq_jax.core.trellis_tensor import table_values
from gptvq_jax.moves.outliers import loss_if_coded, set_aside, without
from gptvq_jax.moves.recode_streams import recode_streams
from gptvq_jax.moves.refit_levels import refit_levels
from gptvq_jax.moves.residual import residual_of
from gptvq_jax.moves.stream_column import Layout, column_values
from gptvq_jax.moves.sweep_streams import sweep_streams

ROWS, COLS, STREAM, BITS = 32, 12, 16, 6
sweep = jax.jit(sweep_streams, static_argnames=("stream_rows", "block_size", "native"))
recode = jax.jit(recode_streams, static_argnames=("stream_rows", "block_size", "native"))


def problem(seed=0, padding=0):
    """Weight (C, R) with a few large entries, Hessian, layout, rates and outliers."""
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.5, 2, ROWS).astype(np.float16).astype(np.float32)
    weight = (rng.normal(size=(COLS, ROWS)) * scales).astype(np.float32)
    weight[rng.integers(0, COLS, 3), rng.integers(0, ROWS - padding, 3)] *= 12
    inputs = rng.normal(size=(60, COLS)) @ rng.normal(size=(COLS, COLS))
    hessian = jnp.asarray(inputs.T @ inputs / 60, jnp.float32)
    used = np.ones(ROWS, np.float32)
    if padding:
        used[-padding:], weight[:, -padding:], scales[-padding:] = 0, 0, 1
    layout = Layout(jnp.asarray(scales), jnp.asarray(used), jnp.asarray(gaussian_values(BITS)))
    rates = jnp.asarray(rng.integers(0, 4, COLS), jnp.int32)
    outliers = jnp.abs(weight) > 4 * scales
    return jnp.asarray(weight), hessian, layout, rates, outliers


def values(columns, rates, layout):
    return jax.vmap(partial(column_values, layout=layout))(columns, rates)


def loss(weight, quantized, hessian):
    return float(quadratic_loss(weight.T, quantized.T, hessian))


@pytest.mark.parametrize("block_size", [3, 4, 12])
def test_what_the_sweep_returns_is_what_its_columns_stand_for(block_size):
    weight, hessian, layout, rates, outliers = problem()
    chol = inverse_cholesky(hessian)
    options = dict(stream_rows=STREAM, block_size=block_size)
    columns, quantized = sweep(weight, chol, rates, outliers, layout, **options)
    np.testing.assert_allclose(quantized, values(columns, rates, layout), rtol=1e-6)
    assert not np.any(np.asarray(columns.added)[~np.asarray(outliers)])
    # Rate 0 leaves outliers alone; these are exact but for float16 and what was fed into them.
    zero = np.asarray(rates) == 0
    assert zero.any() and not np.any(np.asarray(quantized)[zero][~np.asarray(outliers)[zero]])
    # Lazy blocks are the same sweep; a rounding may send a search another way.
    whole = sweep(weight, chol, rates, outliers, layout, stream_rows=STREAM, block_size=12)[1]
    assert loss(weight, quantized, hessian) == pytest.approx(loss(weight, whole, hessian), rel=0.05)


def test_feedback_pays():
    weight, hessian, layout, rates, outliers = problem(1)
    options = dict(stream_rows=STREAM, block_size=4)
    columns, with_it = sweep(weight, inverse_cholesky(hessian), rates, outliers, layout, **options)
    _, without = sweep(weight, jnp.eye(COLS), rates, outliers, layout, **options)
    assert loss(weight, with_it, hessian) < 0.8 * loss(weight, without, hessian)
    del columns


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block_size", [4, 12])
def test_recode_never_raises_the_loss(seed, block_size):
    weight, hessian, layout, rates, outliers = problem(seed, padding=5)
    options = dict(stream_rows=STREAM, block_size=block_size)
    columns, quantized = sweep(
        weight, inverse_cholesky(hessian), rates, outliers, layout, **options
    )
    residual = residual_of(weight, quantized, hessian)
    before = start = loss(weight, quantized, hessian)
    for _ in range(3):
        columns, residual = recode(residual, hessian, columns, rates, outliers, layout, **options)
        quantized = values(columns, rates, layout)
        np.testing.assert_allclose(residual.error, weight - quantized, atol=1e-4)
        np.testing.assert_allclose(
            residual.image, hessian @ residual.error, atol=1e-3 * np.max(hessian)
        )
        after = loss(weight, quantized, hessian)
        assert after <= before * (1 + 1e-5)
        before = after
    assert after < 0.99 * start  # and it does something


def test_recode_leaves_columns_without_inputs_and_without_bits():
    weight, hessian, layout, rates, outliers = problem(2)
    hessian = hessian.at[3].set(0).at[:, 3].set(0)
    rates = rates.at[3].set(2).at[5].set(0)
    options = dict(stream_rows=STREAM, block_size=4)
    columns, quantized = sweep(weight, jnp.eye(COLS), rates, outliers, layout, **options)
    residual = residual_of(weight, quantized, hessian)
    new, _ = recode(residual, hessian, columns, rates, outliers, layout, **options)
    for a, b in zip(new, columns, strict=True):
        np.testing.assert_array_equal(a[jnp.array([3, 5])], b[jnp.array([3, 5])])
    assert np.any(new.windows != columns.windows)


def test_outliers_are_those_beyond_the_limit_without_themselves():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(200, 120)).astype(np.float32)
    weight *= rng.uniform(0.01, 10, (200, 1)) * rng.uniform(0.1, 3, 120)
    clean = set_aside(weight, 6.0)
    assert not np.any(clean.outliers)
    spiked = weight.copy()
    spiked[7, 3] *= 1e3 / abs(spiked[7, 3]) * abs(weight[7]).max()
    spiked[150, 20] = 200 * abs(weight[150]).max()
    aside = set_aside(spiked, 6.0)
    assert np.argwhere(aside.outliers).tolist() == [[7, 3], [150, 20]]
    np.testing.assert_allclose(aside.row_scales, clean.row_scales, rtol=0.2)
    assert not np.any(set_aside(spiked, 0.0).outliers)


def test_rows_and_columns_of_zeros_have_no_outliers_and_divide_nothing():
    weight = np.random.default_rng(0).normal(size=(20, 10)).astype(np.float32)
    weight[4], weight[:, 7] = 0, 0
    aside = set_aside(weight, 4.5)
    assert not np.any(aside.outliers) and np.all(np.isfinite(aside.row_scales))
    assert aside.row_scales[4] == 1


@pytest.mark.parametrize("rate", [0, 1, 2, 4])
@pytest.mark.parametrize("size", [3.5, 5.0, 9.0])
def test_what_a_large_weight_costs_is_what_the_search_loses_by_it(rate, size):
    rows, cols, bits = 256, 24, 8
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(cols, rows)).astype(np.float32)
    clean[:, 100] = 0
    spiked = clean.copy()
    spiked[:, 100] = size * (1 - 2 * (np.arange(cols) % 2))
    layout = Layout(jnp.ones(rows), jnp.ones(rows), jnp.asarray(gaussian_values(bits)))
    rates, kept = jnp.full(cols, rate), jnp.zeros(clean.shape, bool)
    options = dict(stream_rows=rows, block_size=12)
    lost = [
        np.sum((w - sweep(w, jnp.eye(cols), rates, kept, layout, **options)[1]) ** 2)
        for w in (jnp.asarray(clean), jnp.asarray(spiked))
    ]
    aside = without(spiked.T, spiked.T != clean.T)
    aside = aside._replace(row_scales=jnp.ones(rows, jnp.float16))
    metric = jnp.full(cols, 3.0)
    expected = loss_if_coded(spiked.T, aside, metric, rates, bits)[100] / 3
    np.testing.assert_allclose((lost[1] - lost[0]) / cols, np.mean(expected), rtol=0.3)


@pytest.mark.parametrize("seed", range(3))
def test_levels_and_streams_in_turn_never_raise_the_loss(seed):
    weight, hessian, layout, rates, outliers = problem(seed, padding=5)
    weight = jnp.sign(weight) * jnp.sqrt(jnp.abs(weight))  # no Gaussian
    weight = weight.at[:, -5:].set(0)
    options = dict(stream_rows=STREAM, block_size=4)
    levels = jnp.asarray(gaussian_levels(8))
    layout = layout._replace(table=table_values(BITS, levels))
    columns, quantized = sweep(
        weight, inverse_cholesky(hessian), rates, outliers, layout, **options
    )
    residual = residual_of(weight, quantized, hessian)
    losses = [loss(weight, quantized, hessian)]
    for _ in range(2):
        levels, residual = jax.jit(refit_levels, static_argnames="iterations")(
            residual, hessian, levels, columns, rates, layout, iterations=6
        )
        assert levels.dtype == jnp.float16
        layout = layout._replace(table=table_values(BITS, levels))
        quantized = values(columns, rates, layout)
        np.testing.assert_allclose(residual.error, weight - quantized, atol=1e-4)
        losses.append(loss(weight, quantized, hessian))
        columns, residual = recode(residual, hessian, columns, rates, outliers, layout, **options)
        losses.append(loss(weight, values(columns, rates, layout), hessian))
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(losses))
    assert losses[1] < 0.98 * losses[0]


def test_levels_are_those_of_least_squares():
    weight, hessian, layout, rates, outliers = problem(4)
    levels = jnp.asarray(gaussian_levels(4))
    layout = layout._replace(table=table_values(BITS, levels))
    chol = inverse_cholesky(hessian)
    columns, quantized = sweep(
        weight, chol, rates, outliers, layout, stream_rows=STREAM, block_size=4
    )
    residual = residual_of(weight, quantized, hessian)
    found, _ = refit_levels(residual, hessian, levels, columns, rates, layout, 20)

    def of(levels):
        table = table_values(BITS, jnp.asarray(levels))
        return np.asarray(values(columns, rates, layout._replace(table=table)), np.float64)

    root = np.linalg.cholesky(np.asarray(hessian, np.float64)).T
    nothing = of(np.zeros(4, np.float16))
    each = [(root @ (of(unit) - nothing)).ravel() for unit in np.eye(4, dtype=np.float16)]
    best = np.linalg.lstsq(np.stack(each, 1), (root @ (weight - nothing)).ravel(), rcond=None)[0]
    np.testing.assert_allclose(found, best, rtol=2e-3, atol=2e-3)
