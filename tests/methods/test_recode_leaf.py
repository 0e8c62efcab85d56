"""Codes chosen again by a gradient: which, and to what, against a search in NumPy."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import decode as float64_decode
from test_trainable import COLS, FORMATS, NAMES, ROWS, TRELLIS, decode, made, own

from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.methods.furthest import furthest
from gptvq_jax.methods.leaf_codes import count_bytes, from_bytes, pack_again, to_bytes
from gptvq_jax.methods.recode_leaf import count_vectors, recode_leaf
from gptvq_jax.methods.trainable import unpack
from gptvq_jax.study.sample_tensors import random_trellis

ONE_BOOK = [name for name in FORMATS if name != "aqlm"]


def _slow_but(names, *quick):
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture(autouse=True, scope="module")
def compile_fast(short_programs):
    """What is searched here is tiny."""


@functools.cache
def given(seed: int = 0):
    """A gradient (R, C), and a Hessian (C, C) that ties neighbours together."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(40, COLS)) @ (np.eye(COLS) + 0.4 * np.eye(COLS, k=1))
    return rng.normal(size=(ROWS, COLS)).astype(np.float32), inputs.T @ inputs / 40


def again(tensor, hessian, gradient=None, **options):
    gradient = given()[0] if gradient is None else gradient
    metric = None if hessian is None else jnp.asarray(hessian, jnp.float32)
    options = {"rate": 1.0, "trust": 1e9, **options}
    found = recode_leaf(unpack(tensor), own(tensor), gradient, metric, **options)
    return pack_again(tensor, found.codes), int(found.changed)


def vectors_of(matrix, dim):
    """(R, J, D), zeros behind the last column."""
    rows, cols = matrix.shape
    return np.pad(matrix, ((0, 0), (0, -cols % dim))).reshape(rows, -1, dim)


def blocks_of(hessian, dim):
    """(J, D, D) of the diagonal."""
    padded = np.pad(hessian, (0, -len(hessian) % dim))
    return [padded[i : i + dim, i : i + dim] for i in range(0, len(padded), dim)]


def choices(tensor):
    """All vectors that each vector can be, (K, R, J, D): the tensor with every code everywhere."""
    shape = unpack(tensor).codes.shape
    every = [jnp.full(shape, k, jnp.uint8) for k in range(2**tensor.index_bits)]
    return np.stack(
        [vectors_of(float64_decode(pack_again(tensor, k)), tensor.grid.dim) for k in every]
    )


def of_vectors(tensor, hessian):
    """Squared moves (R, J) per unit of eta, and the mean square of a vector."""
    dim = tensor.grid.dim
    blocks = blocks_of(np.eye(COLS) if hessian is None else hessian, dim)
    blocks = [b + (1e-6 * np.trace(b) + (np.trace(b) == 0)) * np.eye(dim) for b in blocks]
    pull = vectors_of(given()[0].astype(np.float64), dim)
    weight = vectors_of(float64_decode(tensor), dim)
    inverse = np.linalg.inv(blocks)
    moves = np.einsum("rjd,jde,rje->rj", pull, inverse, pull)
    return moves, np.mean(np.einsum("rjd,jde,rje->rj", weight, np.stack(blocks), weight))


def eta_of(moves, size, count, rate):
    largest = np.sort(moves.reshape(-1))[::-1][:count]
    return rate * np.sqrt(size / largest.mean())


@pytest.mark.parametrize("name", _slow_but(ONE_BOOK, "float16"))
def test_l2_takes_the_nearest_for_those_that_move_furthest(name):
    """Each vector by itself, to what is nearest to Q - eta G among all that it can be."""
    tensor = made(name)
    new, changed = again(tensor, None, share=0.2, rate=1.5)
    moves, size = of_vectors(tensor, None)
    count = round(0.2 * moves.size)
    chosen = moves >= np.sort(moves.reshape(-1))[-count]
    dim = tensor.grid.dim
    old = vectors_of(float64_decode(tensor), dim)
    pull = vectors_of(given()[0].astype(np.float64), dim)
    target = old - eta_of(moves, size, count, 1.5) * pull
    if COLS % dim:  # what a vector has behind the last column counts for nothing in W
        target[:, -1, COLS % dim :] = 0
    found = vectors_of(float64_decode(new), dim)
    np.testing.assert_array_equal(found[~chosen], old[~chosen])
    inside = vectors_of(np.ones((ROWS, COLS)), dim)
    distances = np.sum(inside * np.square(choices(tensor) - target), axis=-1)
    reached = np.sum(inside * np.square(found - target), axis=-1)
    full = chosen & (inside.sum(-1) == dim)
    np.testing.assert_allclose(reached[full], distances.min(0)[full], rtol=1e-5, atol=1e-9)
    assert changed == np.sum(np.any(found != old, axis=-1)) > 0


@pytest.mark.parametrize("metric", ["hessian", pytest.param("l2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", _slow_but(NAMES, "int4", "aqlm", "trellis"))
def test_what_is_minimised_falls_and_all_else_stays(name, metric):
    """2 eta <G, change> + change H change^T, row by row; of other vectors, nothing."""
    tensor, hessian = made(name), given()[1] if metric == "hessian" else None
    new, changed = again(tensor, hessian, share=0.3, rate=2.0)
    change = float64_decode(new) - float64_decode(tensor)
    rows = np.any(change != 0, axis=1)
    assert changed > 0 and rows.any()
    h = np.eye(COLS) if hessian is None else hessian
    first = 2 * np.sum(given()[0] * change, axis=1)
    second = np.einsum("rc,cd,rd->r", change, h, change)
    assert (first[rows] < 0).all() and (second[rows] > 0).all()
    for field in dataclasses.fields(tensor):
        if field.name != "codes":
            for a, b in zip(
                *(jax.tree.leaves(getattr(t, field.name)) for t in (new, tensor)), strict=True
            ):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rate", [3.0, 10.0])
def test_the_metric_of_the_hessian_finds_the_best_code_of_a_single_vector(rate):
    """With one vector chosen coordinate descent is exact: all that it can be, enumerated."""
    tensor, (gradient, hessian) = made("float16"), given()
    dim = tensor.grid.dim
    new, changed = again(tensor, hessian, share=1e-9, rate=rate)
    moves, size = of_vectors(tensor, hessian)
    row, j = np.unravel_index(np.argmax(moves), moves.shape)
    eta = eta_of(moves, size, 1, rate)
    old = vectors_of(float64_decode(tensor), dim)
    block = blocks_of(hessian, dim)[j]
    delta = choices(tensor)[:, row, j] - old[row, j]
    pull = vectors_of(gradient.astype(np.float64), dim)[row, j]
    loss = 2 * eta * delta @ pull + np.einsum("kd,de,ke->k", delta, block, delta)
    found = vectors_of(float64_decode(new), dim)
    assert changed == 1
    assert [tuple(i) for i in np.argwhere(np.any(found != old, axis=-1))] == [(row, j)]
    best = old[row, j] + delta[np.argmin(loss)]
    np.testing.assert_allclose(found[row, j], best, rtol=1e-6)


def _rows_of_streams(tensor):
    return [
        slice(i * tensor.stream_rows, min((i + 1) * tensor.stream_rows, tensor.rows))
        for i in range(tensor.cuts)
    ]


@pytest.mark.parametrize("metric", _slow_but(["hessian", "l2"], "hessian"))
def test_a_stream_is_the_best_of_all_with_its_ends(metric):
    """All streams of 6 rows at one bit that begin with the same L - 1 bits, enumerated."""
    rates = np.array([1, 0, 1, 1, 1])
    tensor = random_trellis(6, 5, window_bits=4, stream_rows=6, outliers=2, rates=rates, seed=1)
    tensor = jax.tree.map(jnp.asarray, tensor)
    rng = np.random.default_rng(5)
    gradient = rng.normal(size=(6, 5)).astype(np.float32)
    inputs = rng.normal(size=(30, 5))
    hessian = inputs.T @ inputs / 30 if metric == "hessian" else np.eye(5)
    new, changed = again(
        tensor, hessian if metric == "hessian" else None, gradient, share=1e-9, rate=4.0
    )
    bend = np.diag(hessian)
    moves = np.where(rates > 0, np.sum(np.square(gradient), axis=0) / bend, 0)
    column = int(np.argmax(moves))
    weight = float64_decode(tensor)
    size = np.mean((np.sum(np.square(weight), axis=0) * bend)[rates > 0])
    eta = 4.0 * np.sqrt(size / moves[column])
    windows = np.asarray(tensor.windows())
    best, loss = None, 0.0
    for bits in itertools.product((0, 1), repeat=6):
        of_rows = [sum(bits[(r + i) % 6] << i for i in range(4)) for r in range(6)]
        if of_rows[0] % 8 != windows[0, column] % 8:
            continue
        values = np.asarray(tensor.values(), np.float64)
        scale = np.float64(tensor.col_scales[column]) * np.asarray(tensor.row_scales, np.float64)
        delta = (values[of_rows] - values[windows[:, column]]) * scale
        found = 2 * eta * gradient[:, column] @ delta + bend[column] * delta @ delta
        if found < loss:
            best, loss = of_rows, found
    assert changed == int(best is not None) == 1
    expected = windows.copy()
    expected[:, column] = best
    np.testing.assert_array_equal(new.windows(), expected)


@pytest.mark.parametrize("name", _slow_but(TRELLIS, "trellis"))
def test_other_streams_keep_their_codes(name):
    tensor = made(name)
    hessian = given()[1]
    new, changed = again(tensor, hessian, share=0.2, rate=3.0)
    moves = np.square(given()[0]) / np.diag(hessian)
    moves = np.where(np.asarray(tensor.column_rates()) > 0, moves, 0)
    by_stream = np.stack([moves[rows].sum(0) for rows in _rows_of_streams(tensor)])
    count = round(0.2 * count_vectors(unpack(tensor)))
    least = np.sort(by_stream.reshape(-1))[-count]
    differs = np.asarray(new.windows()) != np.asarray(tensor.windows())
    differs = np.stack([differs[rows].any(0) for rows in _rows_of_streams(tensor)])
    assert 0 < differs.sum() == changed <= count
    assert (by_stream[differs] >= least).all()


def test_part_of_the_share_and_nothing_without_a_gradient():
    tensor = made("float16")
    _, all_of_it = again(tensor, None, share=0.4, rate=3.0)
    _, half = again(tensor, None, share=0.4, part=0.5, rate=3.0)
    assert 0 < half < all_of_it
    zeros = np.zeros((ROWS, COLS), np.float32)
    assert again(tensor, None, zeros, share=0.4)[1] == 0
    assert again(tensor, np.zeros((COLS, COLS)), share=0.4)[1] == 0
    assert again(made("trellis"), given()[1], zeros, share=0.4)[1] == 0


@pytest.mark.parametrize("name", ["float16", "trellis"])
def test_the_weight_changes_no_more_than_it_is_trusted_to(name):
    """Of the new codes those of the furthest moves, up to the one with which that is reached."""
    tensor, old = made(name), float64_decode(made(name))
    whole, count = again(tensor, None, share=0.3, rate=3.0)
    change = float64_decode(whole) - old
    if isinstance(tensor, TrellisTensor):
        parts = [(rows, slice(c, c + 1)) for rows in _rows_of_streams(tensor) for c in range(COLS)]
    else:
        dim = tensor.grid.dim
        starts = range(0, COLS, dim)
        parts = [(slice(r, r + 1), slice(c, c + dim)) for r in range(ROWS) for c in starts]
    parts = [part for part in parts if change[part].any()]
    parts.sort(key=lambda part: -np.sum(np.square(given()[0][part])))
    assert len(parts) == count >= 3
    for number in (1, 2, count):
        first = sum(np.sum(np.square(change[part])) for part in parts[: number - 1])
        last = np.sum(np.square(change[parts[number - 1]]))
        trust = np.sqrt((first + 0.5 * last) / np.sum(np.square(old)))
        new, changed = again(tensor, None, share=0.3, rate=3.0, trust=trust)
        expected = old.copy()
        for part in parts[:number]:
            expected[part] += change[part]
        np.testing.assert_allclose(float64_decode(new), expected, rtol=1e-6)
        assert changed == number


@pytest.mark.parametrize("name", ["int4", "trellis"])
def test_units_of_gradient_and_hessian_do_not_matter(name):
    gradient, hessian = given()
    one, _ = again(made(name), hessian, share=0.3, rate=2.0)
    for of_gradient, of_hessian in ((2.0**-90, 1.0), (1.0, 2.0**70)):
        scaled = gradient * np.float32(of_gradient)
        other, _ = again(made(name), hessian * of_hessian, scaled, share=0.3, rate=2.0)
        np.testing.assert_array_equal(one.codes, other.codes)


def test_the_furthest_are_the_largest_and_the_first_of_equals():
    square = jnp.array([[1.0, 3.0, 0.0], [3.0, 2.0, 3.0]])
    expected = {1: [1], 2: [1, 3], 3: [1, 3, 5], 4: [1, 3, 4, 5], 6: [0, 1, 3, 4, 5]}
    for count, places in expected.items():
        chosen = np.asarray(furthest(square, count, 6).chosen).reshape(-1)
        assert list(np.flatnonzero(chosen)) == places


@pytest.mark.parametrize("name", _slow_but(NAMES, "int8", "aqlm", "trellis"))
def test_bytes_of_codes_and_back(name):
    tensor = made(name)
    unpacked = unpack(tensor)
    stored = to_bytes(unpacked, unpacked.codes)
    assert stored.shape == (count_bytes(unpacked),) == (np.size(tensor.codes),)
    back = from_bytes(unpacked, stored)
    assert back.dtype == unpacked.codes.dtype
    np.testing.assert_array_equal(back, unpacked.codes)
    packed = pack_again(tensor, unpacked.codes)
    np.testing.assert_array_equal(float64_decode(packed), float64_decode(tensor))
    np.testing.assert_array_equal(decode(packed, own(tensor)), decode(tensor, own(tensor)))
    if isinstance(tensor, TrellisTensor):  # ROWS do not fill the last stream
        assert tensor.cuts * tensor.stream_rows > tensor.rows
