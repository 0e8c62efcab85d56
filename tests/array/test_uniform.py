"""RTN and GPTQ on uniform grids: rounding written out, and GPTQ in float64."""

import array_reference as ref
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.uniform import UniformSettings, gptq, rtn
from gptvq_jax.vq_tensor import FactoredCodebook, dequantize

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
