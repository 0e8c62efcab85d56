"""RTN, GPTQ and int8 rows on uniform grids: rounding written out, and GPTQ in float64."""

import array_reference as ref
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.core import int8_rows as int8_rows_file
from gptvq_jax.core.int8_rows import dequantize_rows, int8_rows
from gptvq_jax.core.vq_tensor import FactoredCodebook, dequantize
from gptvq_jax.methods.uniform import UniformSettings, gptq, rtn

ROWS = 6
# columns, group size, columns of a group: 20 are tiled by 4 groups; 22 are not by 3 (8, 8 and 6)
SHAPES = [(20, 5, 5), (22, 6, 8)]
run_dequantize = jax.jit(dequantize)


def problem(cols):
    """Weights far from 0, which a grid must not be stretched to: padding is 0."""
    p = ref.problem(ROWS, cols)
    return p._replace(weight=p.weight + np.float32(6))


def levels(group, size, symmetric):
    """The grid (K,) of one group of weights, from its own range, in float16 steps."""
    low, high = group.min(), group.max()
    if symmetric:
        high = np.abs(group).max()
        low = -high
    scale = float(np.float16((high - low) / (size - 1)))
    offset = -scale * (size - 1) / 2 if symmetric else float(np.float16(low))
    return offset + scale * np.arange(size)


def quantized(method, p, **kw):
    arrays = (jnp.asarray(a) for a in (p.weight, p.hessian, p.hinv_chol))
    tensor = method(*arrays, jax.random.key(0), settings=UniformSettings(block_size=4, **kw))
    return tensor, np.asarray(run_dequantize(tensor))


@pytest.mark.parametrize(
    "cols, group_size, width, symmetric", [(*SHAPES[0], True), *((*s, False) for s in SHAPES)]
)
def test_rtn_is_plain_rounding(cols, group_size, width, symmetric):
    p = problem(cols)
    tensor, got = quantized(rtn, p, bits=3, group_size=group_size, symmetric=symmetric)
    expected = np.empty((ROWS, cols))
    for r in range(ROWS):
        for start in range(0, cols, width):
            group = p.weight[r, start : start + width].astype(np.float64)
            grid = levels(group, 8, symmetric)
            code = np.clip(np.round((group - grid[0]) / (grid[1] - grid[0])), 0, 7)
            expected[r, start : start + width] = grid[code.astype(int)]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    # 3 bits a code, byte-aligned rows; float16 scale (and offset) of each group; the right factor
    numbers = 1 if symmetric else 2
    groups = ROWS * -(-cols // width)
    assert tensor.num_bytes == ROWS * -(-cols * 3 // 8) + 2 * numbers * (groups + 8)
    settings = UniformSettings(bits=3, group_size=group_size, symmetric=symmetric)
    assert settings.bytes(ROWS, cols) == tensor.num_bytes


@pytest.mark.parametrize("cols, group_size, width", SHAPES)
def test_gptq_against_float64(cols, group_size, width):
    p = problem(cols)
    tensor, got = quantized(gptq, p, bits=3, group_size=group_size)
    assert (tensor.grid.strip_rows, tensor.grid.strip_cols) == (1, width)

    def fit(group, scales, u, strip, row):
        return levels(group[0], 8, False)[:, None]

    expected = ref.sweep(p.weight, p.hinv_chol, tensor.grid, fit)
    np.testing.assert_array_equal(tensor.unpack_codes()[0], expected.codes)
    np.testing.assert_allclose(got, expected.quantized, atol=1e-4)


def test_gptq_beats_rounding_in_the_loss_not_in_the_weights():
    p = ref.problem(ROWS, 20)
    kw = dict(bits=3, group_size=5)
    fed, plain = quantized(gptq, p, **kw)[1], quantized(rtn, p, **kw)[1]
    assert ref.loss(p.weight, fed, p.hessian) < 0.7 * ref.loss(p.weight, plain, p.hessian)
    assert np.sum((p.weight - fed) ** 2) > np.sum((p.weight - plain) ** 2)


def test_whole_rows_and_equal_weights():
    p = ref.problem(ROWS, 20)
    p = p._replace(weight=np.repeat(p.weight[:, :1], 20, 1))
    tensor, got = quantized(gptq, p, bits=3, group_size=0)
    assert isinstance(tensor.codebook, FactoredCodebook) and tensor.grid.col_strips == 1
    np.testing.assert_allclose(got, p.weight, rtol=2.0**-10, atol=2e-4)


@pytest.mark.parametrize(
    "field, value", [("bits", 0), ("bits", 9), ("group_size", -1), ("block_size", 0)]
)
def test_bad_settings_name_their_field_and_value(field, value):
    with pytest.raises(ValueError, match=rf"^uniform\.{field}={value} must be "):
        UniformSettings(**{field: value})


# --- int8 rows ---

STEP = 2.0**-24  # the smallest float16


def rows_of_all_sizes(cols=37):
    """Rows with peaks from beyond the smallest float16 scale to near the largest."""
    rng = np.random.default_rng(0)
    peaks = 10.0 ** np.array([-7, -5, -4, -3, -2, -1, 0, 2, 4, 6, 6.8])
    rows = rng.uniform(-1, 1, (len(peaks), cols))
    return (rows * (peaks / np.abs(rows).max(1))[:, None]).astype(np.float32)


def test_int8_rows_take_the_nearest_level_of_the_smallest_spanning_scale():
    weight = rows_of_all_sizes()
    tensor = int8_rows(weight)
    got, codes = dequantize_rows(tensor), np.asarray(tensor.unpack_codes())[0]
    for r, row in enumerate(weight.astype(np.float64)):
        scale = tensor.codebook.left[0, 0, r, 0]
        assert 127.5 * float(scale) >= np.abs(row).max()
        assert 127.5 * float(np.nextafter(scale, np.float16(0))) < np.abs(row).max()
        levels = float(scale) * (np.arange(256) - 127.5)
        np.testing.assert_array_equal(got[r], levels[codes[r]])
        distance = np.abs(row[:, None] - levels)
        assert np.all(distance.min(1) <= float(scale) / 2)
        chosen = np.abs(row - got[r])
        np.testing.assert_allclose(chosen, distance.min(1), rtol=0, atol=1e-5 * float(scale))
    # a byte per entry, a float16 per row, and the 256 levels of scale 1
    assert tensor.num_bytes == weight.size + 2 * len(weight) + 2 * 256


def test_int8_rows_of_zeros_and_near_zeros():
    peaks = np.array([0, 1e-30, STEP / 4.1, STEP / 3.9, 3e-6], np.float32)
    weight = peaks[:, None] * np.array([1, -1, 0.5], np.float32)
    tensor = int8_rows(weight)
    np.testing.assert_array_equal(tensor.codebook.left.ravel(), [0, 0, 0, STEP, STEP])
    got = dequantize_rows(tensor).astype(np.float64)
    np.testing.assert_array_equal(got[:3], 0)
    assert np.all(np.abs(got - weight) <= STEP / 2)
    np.testing.assert_allclose(got[4], weight[4], rtol=0.02)  # rounded, not lost


def test_int8_rows_are_the_symmetric_grid_of_rtn():
    rng = np.random.default_rng(1)
    level = rng.integers(-128, 128, (ROWS, 20)) + 0.5
    level[:, 3] = -127.5  # then the scale needs no rounding, which rtn does to nearest
    weight = level + rng.uniform(-0.4, 0.4, level.shape) * (np.abs(level) < 127)
    weight = (weight * 2.0 ** -np.arange(ROWS)[:, None]).astype(np.float32)
    p = ref.problem(ROWS, 20)._replace(weight=weight)
    expected, values = quantized(rtn, p, bits=8, group_size=0, symmetric=True)
    tensor = int8_rows(weight)
    assert jax.tree.structure(tensor) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(tensor), jax.tree.leaves(expected), strict=True):
        assert type(a) is np.ndarray and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(dequantize_rows(tensor), values)


@pytest.mark.parametrize("values", [1, 100, 10**6])
def test_int8_rows_do_not_depend_on_chunks(values, monkeypatch):
    weight = rows_of_all_sizes()
    whole = int8_rows(weight)
    monkeypatch.setattr(int8_rows_file, "_CHUNK_VALUES", values)
    tensor = int8_rows(np.asfortranarray(weight))
    for a, b in zip(jax.tree.leaves(tensor), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(dequantize_rows(tensor), run_dequantize(whole))


@pytest.mark.parametrize("value", [127.6 * 65504, -1e30, np.nan, np.inf])
def test_int8_rows_refuse_what_no_scale_spans(value):
    weight = np.ones((3, 4), np.float32)
    weight[1, 2] = 127.5 * 65504
    assert dequantize_rows(int8_rows(weight))[1, 2] == 127.5 * 65504
    weight[1, 2] = value
    with pytest.raises(ValueError, match=r"is beyond the range of int8 rows, 8\.35e\+06"):
        int8_rows(weight)
