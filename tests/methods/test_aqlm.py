"""AQLM end to end: properties, degenerate layers, and what every setting does."""

import functools

import array_reference as ref
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aqlm_layers import (
    ADAM,
    COLS,
    PAPER,
    ROWS,
    SMALL,
    TINY,
    P,
    decoded,
    error_of,
    layer,
    loss_of,
    mean_error,
    parts,
    same,
    tensor_of,
)

from gptvq_jax.core.code_usage import code_usage
from gptvq_jax.methods.aqlm import AQLMSettings, quantize

pytestmark = pytest.mark.usefixtures("short_programs")

# properties


def test_codebooks_with_a_centroid_for_every_vector_are_exact():
    """24 vectors and 256 centroids: what is left is the rounding to float16."""
    problem = ref.problem(12, 16)
    settings = AQLMSettings(num_codebooks=1, code_bits=8, rounds=2)
    compiled = jax.jit(quantize, static_argnames="settings")
    arrays = problem.weight, problem.hessian, problem.hinv_chol
    tensor = compiled(*arrays, jax.random.key(0), settings=settings)
    assert tensor.codes.shape == (1, 12, 2) and tensor.codebook.codebook_size == 256
    assert code_usage(tensor).unused_centroids >= 256 - 24
    assert np.isfinite(tensor.codebook.centroids).all()
    error = ref.loss(problem.weight, decoded(tensor), problem.hessian)
    assert error < 1e-6 * ref.loss(problem.weight, 0, problem.hessian)


def test_permuting_rows_permutes_the_result():
    kw = dict(PAPER, start="residual", rounds=4)
    order = np.random.default_rng(0).permutation(ROWS)
    one = decoded(tensor_of(**kw))[order]
    other = decoded(tensor_of(P._replace(weight=P.weight[order]), **kw))
    # Sums over rows run in another order: the last digit of a centroid, and a rare near tie.
    assert np.mean(np.abs(one - other) < 5e-3) > 0.98


def test_weights_of_another_size_only_change_the_scales():
    one = tensor_of(rounds=4)
    other = tensor_of(P._replace(weight=P.weight / 64), rounds=4)
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.codebook.centroids, other.codebook.centroids)
    np.testing.assert_array_equal(one.row_scales, other.row_scales * 64)


def damaged(kind):
    """The problem with what calibration may bring."""
    weight, hessian = P.weight / 64, P.hessian.copy()
    if kind == "a row of zeros":
        weight[3] = 0
    elif kind == "zero weight":
        weight[:] = 0
    elif kind == "zero Hessian":
        hessian[:] = 0
    else:
        inputs = np.random.default_rng(0).normal(size=(5, COLS)).astype(np.float32)
        inputs[:, [3, 40, 41, 43]] = 0
        hessian = inputs.T @ inputs / 5
        weight[:, [3, 40, 41, 43]] = 0
    dead = np.diag(hessian) == 0
    damped = hessian + np.diag(np.where(dead, 1, 0.01 * np.mean(np.diag(hessian))))
    arrays = weight, hessian, damped, ref.inverse_cholesky(damped)
    return ref.Problem(*(np.asarray(a, np.float32) for a in arrays))


@pytest.mark.parametrize("kind", ["a row of zeros", "zero weight", "zero Hessian", "few tokens"])
@pytest.mark.parametrize("kw", [{}, dict(ADAM, learning_rate=1e-2)], ids=["base", "adam"])
def test_degenerate_layers(kind, kw):
    problem = damaged(kind)
    tensor = tensor_of(problem, **kw, rounds=4)
    assert all(np.isfinite(a).all() for a in parts(tensor))
    quantized = decoded(tensor)
    error = ref.loss(problem.weight, quantized, problem.hessian)
    error = error / (ref.loss(problem.weight, 0, problem.hessian) or 1.0)
    if kind == "a row of zeros":
        assert np.abs(quantized[3]).max() < 0.05 * np.abs(quantized).max()
        assert error < 1.3 * error_of(**kw, rounds=4)
    elif kind == "zero weight":
        assert not quantized.any()
    elif kind == "zero Hessian":  # no output to fit: k-means of the weights themselves
        distance = np.mean(np.square(problem.weight - quantized))
        assert distance < 0.8 * np.mean(np.square(problem.weight))
    else:
        assert error < 0.02  # 40 columns serve 5 directions


# what the settings do


@pytest.mark.parametrize("seed", range(4))
def test_rounds_never_raise_the_loss(seed):
    problem = layer(seed)
    losses = [loss_of(problem, rounds=rounds) for rounds in (0, 1, 2, 3, 4, 8)]
    for before, after in zip(losses, losses[1:], strict=False):
        assert after <= before * (1 + 1e-5)  # a round is judged by sums in float32


def test_rounds_lower_the_error():
    """By 12 and 9 percent or more with three seeds of four layers."""
    none, one, eight = (mean_error(rounds=rounds) for rounds in (0, 1, 8))
    assert one < 0.9 * none
    assert eight < 0.95 * one


def test_rounds_bring_unused_centroids_into_use():
    def unused(rounds):
        tensors = [tensor_of(layer(seed), em_iterations=20, rounds=rounds) for seed in range(8)]
        return sum(int(code_usage(tensor).unused_centroids) for tensor in tensors)

    assert unused(0) > 0 == unused(8)


def test_rounds_stop_when_one_gains_less_than_the_tolerance():
    one, two = (tensor_of(rounds=rounds) for rounds in (1, 2))
    assert same(tensor_of(rounds=8, tolerance=0.999), one) and not same(one, two)


def test_em_lowers_the_error():
    assert mean_error(em_iterations=20) < 0.9 * mean_error(em_iterations=0)


def test_steps_of_the_codebook_update_lower_the_error():
    """At the same codes."""
    errors = [error_of(update_iterations=steps) for steps in (1, 2, 8, 200)]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.9 * errors[1]
    assert errors[3] < errors[2]


def test_a_wider_beam_lowers_the_error():
    """Of one round, where both start from the same codes."""
    greedy, wide = (
        np.array([error_of(layer(seed), rounds=1, beam=beam) for seed in range(8)])
        for beam in (1, 4)
    )
    # A search that is better in itself (test_beam) may end in a worse optimum of the codebooks: by
    # 1.8 percent at most in 24 layers, of which a near tie that rounding breaks may add one.
    assert np.max(wide / greedy) < 1.05
    assert wide.mean() < 0.98 * greedy.mean()


def test_random_seeds_are_worse_until_em_moves_them():
    random, plus_plus = (
        [mean_error(8, seed=seed, em_iterations=steps) for steps in (0, 20)]
        for seed in ("random", "kmeans++")
    )
    assert random[0] > 1.05 * plus_plus[0]
    assert random[1] < 0.85 * random[0]
    assert random[1] == pytest.approx(plus_plus[1], rel=0.15)


def test_block_size_only_changes_the_rounding():
    one, other = (tensor_of(SMALL, **TINY, rounds=4, block_size=size) for size in (16, 4))
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_allclose(decoded(one), decoded(other), atol=2e-3)


def test_the_key_chooses_the_seeds():
    assert same(tensor_of(key=1), tensor_of(key=1))
    assert not np.array_equal(tensor_of(key=1).codes, tensor_of(key=2).codes)


def test_program_does_not_grow_with_columns():
    settings = AQLMSettings(code_bits=4, block_size=16, beam=2)

    def size(cols):
        arrays = [jnp.zeros(shape) for shape in ((ROWS, cols), (cols, cols), (cols, cols))]
        run = functools.partial(quantize, settings=settings)
        return ref.count_equations(run, *arrays, jax.random.key(0))

    assert size(64) == size(512) > 300
