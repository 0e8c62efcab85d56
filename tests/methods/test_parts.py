"""Layers in parts of their rows: what a part draws and finds is what the whole layer would."""

import itertools

import array_reference as ref
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.core.hessian import Factor
from gptvq_jax.core.vq_tensor import concat_rows, dequantize
from gptvq_jax.methods import gptvq_settings, layer
from gptvq_jax.methods.gptvq import GPTVQSettings, quantize
from gptvq_jax.methods.layer import Objective, quantize_layer

pytestmark = pytest.mark.usefixtures("short_programs")

BASE = dict(bits=2.0, group_size=256, max_group_cols=32, block_size=16, em_iterations=4)
# Without least squares every step is one of a row or a group alone; until it has converged, all
# groups of a layer share the length of its steps.
ALONE = dict(codebook_update="none", polish_rounds=0)
RECODED = dict(codebook_update="none", polish_rounds=2, polish_tolerance=0.0)
CONVERGED = dict(update_iterations=200, polish_rounds=0)
SCALED = dict(CONVERGED, row_scales=True)
KEY = jax.random.key(3)


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of as few rows as there can be."""
    monkeypatch.setattr(gptvq_settings, "_PART_ROWS", 1)


def whole_and_parts(problem, settings):
    """Both tensors, and the number of parts."""
    weight, *square = (jnp.asarray(a) for a in problem[:2] + problem[3:])
    grid, first_rows = settings.parts(*weight.shape)
    parts = [
        quantize(
            weight[row : row + grid.rows],
            *square,
            KEY,
            settings,
            grid=grid,
            first_strip=row // grid.strip_rows,
        )
        for row in first_rows
    ]
    return quantize(weight, *square, KEY, settings), concat_rows(parts), len(parts)


@pytest.mark.parametrize(
    "rows, cols, strips",
    [
        (48, 44, 4),
        *(
            pytest.param(*shape, marks=pytest.mark.slow)
            for shape in [(32, 64, 4), (64, 33, 4), (40, 36, 2)]
        ),
    ],
)
@pytest.mark.parametrize(
    "kw",
    [
        ALONE,
        dict(RECODED, dim=1),
        dict(CONVERGED, dim=4, bits=1.0),
        dict(ALONE, seed="random"),
        SCALED,
    ],
    ids=["2d", "1d recoded", "4d converged", "random", "row scales"],
)
def test_parts_are_the_whole(small_parts, rows, cols, strips, kw):
    whole, parts, count = whole_and_parts(
        ref.problem(rows, cols, seed=1), GPTVQSettings(**{**BASE, **kw})
    )
    assert count == whole.grid.row_strips == strips
    assert parts.grid == whole.grid
    np.testing.assert_array_equal(parts.codes, whole.codes)
    if "update_iterations" in kw:  # a sum's last digit may be the one that int8 rounds by
        step = 1.01 * np.asarray(whole.codebook.scale, np.float32)[..., None, None]
        assert np.all(np.abs(parts.codebook.values() - whole.codebook.values()) <= step)
    else:
        assert_same(parts.codebook, whole.codebook)


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_parts_of_the_size_that_layers_have():
    settings = GPTVQSettings(**{**BASE, **ALONE, "group_size": 2048})
    whole, parts, count = whole_and_parts(ref.problem(512, 64), settings)
    assert count == 2 and whole.grid.row_strips == 8
    np.testing.assert_array_equal(parts.codes, whole.codes)
    assert_same(parts.codebook, whole.codebook)


def test_few_steps_of_least_squares_are_worth_the_same(small_parts):
    """Each part takes steps of its own length, and stops when it gains no more itself."""
    settings = GPTVQSettings(**BASE, update_iterations=2, polish_rounds=2)
    errors = []
    for seed in range(6):
        problem = ref.problem(32, 64, seed=seed)
        *tensors, count = whole_and_parts(problem, settings)
        assert count == 4
        quantized = [jax.jit(dequantize)(tensor) for tensor in tensors]
        errors.append([ref.loss(problem.weight, q, problem.hessian) for q in quantized])
    whole, parts = np.transpose(errors)
    np.testing.assert_allclose(parts, whole, rtol=0.04)
    assert np.mean(parts / whole) == pytest.approx(1, abs=0.015)


def test_parts_cover_the_rows_in_whole_strips():
    """As few of equal height as are small enough, and no strip is cut."""
    settings = [GPTVQSettings(dim=dim, bits=bits) for dim, bits in [(1, 3.0), (2, 2.0), (4, 2.0)]]
    shapes = itertools.product((192, 576, 1000, 1536, 4096, 11008), (576, 1536, 4096))
    seen = set()
    for of_layer, (rows, cols) in itertools.product(settings, shapes):
        whole = of_layer.grid(rows, cols)
        grid, first_rows = of_layer.parts(rows, cols)
        count = len(first_rows)
        assert list(first_rows) == [k * grid.rows for k in range(count)]
        assert count * grid.rows == rows
        if whole.row_strips * whole.strip_rows != rows:
            assert count == 1 and grid == whole
            continue
        assert grid.rows % grid.strip_rows == 0
        assert (grid.strip_rows, grid.strip_cols) == (whole.strip_rows, whole.strip_cols)
        assert grid.rows <= gptvq_settings._PART_ROWS or grid.row_strips == 1
        for fewer in range(1, count):
            assert whole.row_strips % fewer or rows // fewer > gptvq_settings._PART_ROWS
        seen.add(count)
    assert min(seen) == 1 and max(seen) > 8


@pytest.mark.parametrize(
    "kw, shape",
    [
        (dict(dim=1, svd_rank=2), (1024, 64)),
        (dict(scale_block_size=8), (1024, 64)),
        (dict(group_size=1000), (1021, 64)),  # a prime number of rows
        (dict(), (256, 64)),  # small enough
    ],
    ids=["svd", "scales", "no whole strips", "small"],
)
def test_what_rows_share_is_not_cut(kw, shape):
    settings = GPTVQSettings(**{**BASE, **kw})
    grid, first_rows = settings.parts(*shape)
    assert grid == settings.grid(*shape) and list(first_rows) == [0]
    assert grid.row_strips > 1


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_layer_is_cut_on_a_cpu_only(small_parts, monkeypatch, on_cpu):
    monkeypatch.setattr(layer, "_on_cpu", lambda: on_cpu)
    settings, problem = GPTVQSettings(**BASE, **ALONE), ref.problem(32, 64)
    calls = []

    def counted(weight, *args, **kw):
        calls.append((weight.shape, kw.get("first_strip")))
        return quantize(weight, *args, **kw)

    hessian, hinv_chol = jnp.asarray(problem.hessian), jnp.asarray(problem.hinv_chol)
    objective = Objective(hessian, Factor(hinv_chol, 0.01))
    tensor = quantize_layer(counted, settings, jnp.asarray(problem.weight), [objective], KEY)
    expected = [((8, 64), k) for k in range(4)] if on_cpu else [((32, 64), None)]
    assert sorted(calls) == expected
    whole, *_ = whole_and_parts(problem, settings)
    assert_same(tensor, whole)
