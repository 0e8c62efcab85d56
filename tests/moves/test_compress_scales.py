"""compress, scales, and the stored tensor: error bounds, exact cases, loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.packing import pack
from gptvq_jax.core.vq_tensor import (
    BlockScales,
    DenseCodebook,
    VQTensor,
    dequantize,
    pack_codes,
)
from gptvq_jax.moves.compress import (
    quantize_centroids,
    quantize_factors,
    sort_codebook,
    svd_factors,
)
from gptvq_jax.moves.residual import residual_of
from gptvq_jax.moves.scales import RowScales, normalize_strip, refit_row_scales, row_norms

quantize_centroids = jax.jit(quantize_centroids, static_argnames="bits")
quantize_factors = jax.jit(quantize_factors, static_argnames="bits")
svd_factors = jax.jit(svd_factors, static_argnames="rank")
normalize_strip = jax.jit(normalize_strip, static_argnames="block_size")
values = jax.jit(lambda book: book.values())
per_column = jax.jit(lambda scales: scales.per_column())

# One (M, S, G, K, D) shape for every test of a kind: each new shape compiles anew.
SHAPE = (1, 2, 3, 5, 2)


def centroids_of(shape=SHAPE, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# centroids


@pytest.mark.parametrize("bits, top", [(8, 127), (4, 7)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rounding_error_is_at_most_half_a_step(bits, top, size):
    centroids = size * centroids_of()
    book = quantize_centroids(centroids, bits)
    assert book.scale.dtype == jnp.float16 and book.scale.shape == SHAPE[:3]
    stored, centroids = np.asarray(values(book)), np.asarray(centroids)
    peak = np.abs(centroids).max((-2, -1))
    # Half a step, and what a float16 scale may be off at the largest centroid.
    bound = peak / top * 0.5 + peak * 2.0**-11 + top * 2.0**-24
    error = np.abs(stored - centroids).max((-2, -1))
    assert (error <= bound * 1.001).all()
    assert error.max() > 0.1 * peak.max() / top  # it does round
    assert (np.abs(stored).max((-2, -1)) > 0.9 * peak).all()


def test_stored_sizes():
    book8, book4, book16 = (quantize_centroids(centroids_of(), b) for b in (8, 4, 16))
    assert (book8.centroids.dtype, book8.centroids.shape) == (jnp.int8, SHAPE)
    assert (book4.centroids.dtype, book4.centroids.shape) == (jnp.uint8, (*SHAPE[:3], 5))
    assert (book16.centroids.dtype, book16.scale) == (jnp.float16, None)
    assert {values(book).dtype for book in (book8, book4, book16)} == {jnp.dtype("float32")}


def test_int8_by_hand():
    # peak 2.54 -> step 0.02 (float16: 0.02000427); 1.0 -> 50, -2.54 -> -127
    book = quantize_centroids(jnp.array([[[[[1.0], [-2.54]]]]]), 8)
    np.testing.assert_array_equal(book.centroids.reshape(-1), [50, -127])
    np.testing.assert_allclose(values(book).reshape(-1), [1.0, -2.54], rtol=1e-3)


def test_int4_holds_every_level():
    levels = jnp.arange(-7.0, 8.0).reshape(1, 1, 1, 15, 1)  # odd count: the last byte is half used
    book = quantize_centroids(levels, 4)
    assert book.centroids.shape == (1, 1, 1, 8)
    np.testing.assert_array_equal(values(book), levels)


def test_float16_error():
    centroids = centroids_of()
    stored = values(quantize_centroids(centroids, 16))
    np.testing.assert_allclose(stored, centroids, rtol=2.0**-11, atol=2.0**-25)
    assert (stored != centroids).any()


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_zero_codebook_is_exact(bits):
    stored = values(quantize_centroids(jnp.zeros(SHAPE), bits))
    np.testing.assert_array_equal(stored, np.zeros(SHAPE))


def test_centroid_bits_out_of_range():
    with pytest.raises(ValueError, match="bits=5 must be 16, 8 or 4"):
        quantize_centroids(centroids_of(), 5)


# SVD of 1D codebooks

SCALARS = (1, 2, 5, 4, 1)


def test_sort_codebook():
    centroids = centroids_of(SCALARS)
    ordered, rank = sort_codebook(centroids)
    np.testing.assert_array_equal(ordered, np.sort(centroids, axis=-2))
    # Code k of a group becomes rank[k]: the value it stands for is the same.
    same = np.take_along_axis(np.asarray(ordered), np.asarray(rank)[..., None], -2)
    np.testing.assert_array_equal(same, centroids)


def test_full_rank_is_exact():
    centroids = centroids_of(SCALARS)
    left, right = map(np.asarray, svd_factors(centroids, 4))
    assert left.shape == (1, 2, 5, 4) and right.shape == (4, 4)
    np.testing.assert_allclose((left @ right)[..., None], centroids, atol=1e-5)


def test_low_rank_is_the_truncated_svd():
    centroids = centroids_of(SCALARS)
    left, right = map(np.asarray, svd_factors(centroids, 2))
    u, s, v = np.linalg.svd(np.asarray(centroids, np.float64).reshape(10, 4), full_matrices=False)
    expected = (u[:, :2] * s[:2]) @ v[:2]
    np.testing.assert_allclose((left @ right).reshape(10, 4), expected, atol=1e-5)
    norms = np.linalg.norm(left.reshape(10, 2), axis=0), np.linalg.norm(right, axis=1)
    np.testing.assert_allclose(*norms, rtol=1e-4)  # factors of like magnitude


def test_rank_is_capped_by_the_number_of_codebooks():
    left, right = svd_factors(centroids_of((1, 1, 2, 4, 1)), 4)
    assert left.shape == (1, 1, 2, 2) and right.shape == (2, 4)


def test_factors_in_few_bits():
    left, right = map(np.asarray, svd_factors(centroids_of(SCALARS), 4))
    half = quantize_factors(left, right, 16)
    assert (half.left.dtype, half.right.dtype, half.left_scale) == (jnp.float16, jnp.float16, None)
    np.testing.assert_allclose(values(half), (left @ right)[..., None], atol=1e-2)
    byte = quantize_factors(left, right, 8)
    assert (byte.left.dtype, byte.left_scale.dtype) == (jnp.int8, jnp.float16)
    assert byte.left_scale.shape == (4,) and values(byte).shape == SCALARS
    # Half a step of each factor column, through |right|.
    bound = (np.abs(left).max((0, 1, 2)) / 127 * 0.5 * 1.01) @ np.abs(right) + 1e-2
    error = np.abs(np.asarray(values(byte))[..., 0] - left @ right)
    assert (error <= bound).all()
    with pytest.raises(ValueError, match="bits=4 must be 16 or 8"):
        quantize_factors(left, right, 4)


# block scales


def weights_of(seed=0, spread=4.0):
    """(c, G, r) = (20, 2, 3): rows of very different size, one block and one row all zero."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(20, 2, 3)) * 2.0 ** rng.uniform(-spread, spread, (1, 2, 3))
    weight[8:16, 0, 0] = 0
    weight[:, 1, 2] = 0
    return weight.astype(np.float32)


@pytest.mark.parametrize("spread", [0.0, 0.01, 4.0])
def test_largest_weight_of_every_block_is_near_one(spread):
    weight = weights_of(spread=spread)
    scales = normalize_strip(weight, 8)
    assert scales.codes.shape == (3, 2, 3)  # 8, 8 and 4 columns
    assert scales.offset.dtype == scales.step.dtype == jnp.float16
    assert scales.codes.min() >= 0 and scales.codes.max() <= 15
    scale = np.asarray(per_column(scales))
    assert scale.shape == weight.shape and (scale > 0).all()
    normal = np.abs(weight) / scale
    for start in (0, 8, 16):
        peak = normal[start : start + 8].max(0)
        peak = peak[peak > 0]
        # Half a step of log2, and the rounding of the float16 offset and step.
        slack = float(scales.step) * 0.55 + 2.0**-9
        assert np.abs(np.log2(peak)).max() <= slack
        assert (scale[start : start + 8] == scale[start]).all()
    assert scales.codes.max() == 15 and scales.codes.min() == 0  # the range is used


def test_scales_by_hand():
    # Peaks 1, 2^7.6 and 2^15: log2 spans 15, the step is 1, the codes 0, 8 (of 7.6), 15.
    weight = jnp.zeros((6, 1, 1)).at[0].set(1.0).at[2].set(-(2.0**7.6)).at[5].set(2.0**15)
    scales = normalize_strip(weight, 2)
    assert (scales.offset, scales.step) == (0, 1)
    np.testing.assert_array_equal(scales.codes[:, 0, 0], [0, 8, 15])
    values = 2.0 ** np.array([0, 8, 15])
    np.testing.assert_allclose(per_column(scales)[:, 0, 0], values.repeat(2), rtol=1e-6)
    np.testing.assert_allclose(scales.per_vector(2)[:, 0, 0], values, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.75])
def test_equal_blocks(value):
    scales = normalize_strip(jnp.full((20, 2, 3), value), 8)
    np.testing.assert_array_equal(scales.codes, np.zeros((3, 2, 3)))
    np.testing.assert_allclose(per_column(scales), value or 1.0, rtol=1e-3)


# row scales


def test_row_norms_by_hand():
    """Two columns and five rows, transposed: 3 and 4 have the root mean square 12.5 ** 0.5."""
    weight = jnp.array([[3.0, 0, -2e-3, 1e-9, 1], [4, 0, 2e-3, 0, 1 + 2**-8]])
    half = [float(np.float16(x)) for x in (12.5**0.5, 2e-3)]
    # A row of zeros, and one whose norm float16 would store as 0, have no scale: 1.
    norms = row_norms(weight)
    np.testing.assert_array_equal(norms, [half[0], 1, half[1], 1, 1 + 2**-9])
    assert norms.dtype == jnp.float32


def test_row_scales_are_the_same_for_every_vector():
    columns = jnp.broadcast_to(jnp.array([[1.0, 2.0], [3.0, 4.0]]), (6, 2, 2))
    np.testing.assert_array_equal(RowScales(columns).per_vector(3), columns[:2])


def refit(weight, hessian, unscaled, scale):
    weight = jnp.asarray(weight)
    whole = residual_of(weight, jnp.zeros_like(weight), hessian)
    return refit_row_scales(residual_of(weight, scale * unscaled, hessian), whole, scale)


def test_row_scales_are_least_squares():
    """Every row against float64; float16 neighbours of what is returned are no better."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6))
    hessian = (inputs.T @ inputs / 40).astype(np.float32)
    size = 2.0 ** rng.uniform(-8, 8, 30)
    weight = (rng.normal(size=(6, 30)) * size).astype(np.float32)
    unscaled = (weight / size + 0.3 * rng.normal(size=(6, 30))).astype(np.float32)
    unscaled[:, 3] *= -1  # a scale may be negative
    start = jnp.asarray(size, jnp.float16).astype(jnp.float32)
    scale, residual = refit(weight, hessian, unscaled, start)
    new = residual_of(jnp.asarray(weight), scale * unscaled, hessian)
    for got, anew in zip(residual, new, strict=True):  # without a product with H
        assert np.all(np.abs(got - anew) < 1e-4 * np.abs(anew).max(axis=0))
    scale = np.asarray(scale)
    assert (scale.astype(np.float16) == scale).all()
    assert scale[3] < 0
    h, w, p = (a.astype(np.float64) for a in (hessian, weight, unscaled))
    for r in range(30):
        best = w[:, r] @ h @ p[:, r] / (p[:, r] @ h @ p[:, r])
        np.testing.assert_allclose(scale[r], best, rtol=2.0**-11 * 1.01)

        def loss(s, r=r):
            error = w[:, r] - s * p[:, r]
            return error @ h @ error

        stored = np.float16(scale[r])
        for other in (np.nextafter(stored, np.float16(x)) for x in (-np.inf, np.inf)):
            # Unless the optimum lies, to float32, in the middle of the two.
            assert loss(float(stored)) < loss(float(other)) * (1 + 1e-6)


def test_row_scales_stay_where_nothing_determines_them():
    hessian = jnp.diag(jnp.array([2.0, 0.0]))
    weight = jnp.array([[1.0, 1, 0, 1e-9, 1e9], [1, 1, 1, 1, 1]])
    unscaled = jnp.array([[0.0, 2, 1, 1, 1], [1, 1, 1, 1, 1]])
    # No output; 1/2; best scale 0, of which nothing can be recoded; too small and too large for
    # float16.
    scale, _ = refit(weight, hessian, unscaled, jnp.full(5, 0.75))
    np.testing.assert_array_equal(scale, [0.75, 0.5, 0.75, 0.75, 0.75])


# the stored tensor


def test_dequantize_is_the_sum_in_its_docstring():
    """M = 2 codebooks, block and row scales, both axes padded; summed weight by weight."""
    grid, bits = GroupGrid(5, 11, 2, strip_rows=2, strip_cols=4), 3
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (2, grid.padded_cols // 2, grid.padded_rows))
    centroids = rng.normal(size=(2, 3, 3, 8, 2)).astype(np.float16)
    scale_codes = rng.integers(0, 16, (5, 3, 2))
    offset, step = np.array([-2, 0, 1], np.float16), np.array([0.5, 0.25, 0.1], np.float16)
    row_scales = np.array([1, 0.5, -2, 0.1, 3], np.float16)
    tensor = VQTensor(
        codes=pack_codes(jnp.asarray(codes), bits, grid),
        codebook=DenseCodebook(jnp.asarray(centroids), None, 16, 8, 2),
        block_scales=BlockScales(
            pack(jnp.asarray(scale_codes), 4), jnp.asarray(offset), jnp.asarray(step), 2, 2
        ),
        index_bits=bits,
        grid=grid,
        row_scales=jnp.asarray(row_scales),
    )
    expected = np.zeros((5, 11))
    for r in range(5):
        for c in range(11):
            strip, group, j = c // 4, r // 2, c // 2
            value = sum(float(centroids[m, strip, group, codes[m, j, r], c % 2]) for m in range(2))
            block = c % 4 // 2
            log = float(offset[strip]) + float(step[strip]) * scale_codes[r, strip, block]
            expected[r, c] = value * 2.0**log * float(row_scales[r])
    np.testing.assert_allclose(jax.jit(dequantize)(tensor), expected, rtol=1e-5)
    np.testing.assert_array_equal(
        tensor.unpack_codes(), codes[:, : grid.num_vectors, :5].transpose(0, 2, 1)
    )
    assert tensor.shape == (5, 11)
    # 2 x 5 rows of 6 codes of 3 bits: 3 bytes; 288 float16; 5 x 3 x 1 byte and 6 float16 of block
    # scales; 5 float16 of row scales
    assert tensor.num_bytes == 2 * 5 * 3 + 2 * 3 * 3 * 8 * 2 * 2 + 5 * 3 * 1 + 6 * 2 + 5 * 2
    assert tensor.bits_per_value == 8 * tensor.num_bytes / 55
