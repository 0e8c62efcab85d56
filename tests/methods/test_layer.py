"""A layer cut into row groups: every group is a layer by itself, stacked into one tensor."""

import dataclasses

import array_reference as ref
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.core.hessian import asymmetric_target, factorize
from gptvq_jax.core.vq_tensor import (
    BlockScales,
    DenseCodebook,
    FactoredCodebook,
    VQTensor,
    concat_rows,
    dequantize,
)
from gptvq_jax.methods.gptvq import GPTVQSettings
from gptvq_jax.methods.layer import (
    Objective,
    check_row_groups,
    losses,
    quantize_layer,
    relative_error,
    row_groups,
)
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.methods.uniform import UniformSettings

ROWS, COLS, GROUPS = 24, 16, 3
# Groups of 8 rows in strips of 4: 2 x 2 codebooks each.
FAST = GPTVQSettings(
    dim=1,
    bits=2.0,
    group_size=32,
    max_group_cols=8,
    seed="mahalanobis",
    em_iterations=1,
    codebook_update="none",
    polish_rounds=0,
)
KEY = jax.random.key(0)
run_dequantize = jax.jit(dequantize)


def objective(seed, cross=False):
    """Of a group whose inputs are its own; with a shift if the target is asymmetric."""
    hessian = jnp.asarray(ref.problem(1, COLS, seed=seed).hessian)
    other = jnp.asarray(ref.problem(1, COLS, seed=seed + 100).hessian)
    weight = jnp.asarray(ref.problem(ROWS, COLS).weight)[: ROWS // GROUPS]
    shift = 0.1 * weight @ (other - hessian) if cross else None
    return Objective(hessian, factorize(hessian, 0.01), shift)


def layer(cross=False):
    weight = jnp.asarray(ref.problem(ROWS, COLS).weight)
    return weight, [objective(seed, cross) for seed in range(GROUPS)]


@pytest.mark.parametrize(
    "method, settings, asymmetry",
    [
        ("gptvq", FAST, 0.0),
        ("gptq", UniformSettings(bits=2, group_size=8), 0.7),
        ("rtn", UniformSettings(bits=3, group_size=0, symmetric=True), 0.0),
    ],
)
def test_row_groups_are_quantized_one_by_one(method, settings, asymmetry):
    quantize = METHODS[method].quantize
    weight, objectives = layer(cross=True)
    tensor = quantize_layer(quantize, settings, weight, objectives, KEY, asymmetry)
    assert tensor.shape == weight.shape
    alone = []
    for start, o in zip(range(0, ROWS, ROWS // GROUPS), objectives, strict=True):
        part, hinv_chol = weight[start : start + ROWS // GROUPS], o.factor.hinv_chol
        target = asymmetric_target(part, o.hessian, o.shift, hinv_chol, asymmetry)
        alone.append(quantize(target, o.hessian, hinv_chol, KEY, settings))
    expected = np.concatenate([run_dequantize(t) for t in alone])
    np.testing.assert_array_equal(run_dequantize(tensor), expected)
    # A uniform grid's right factor is stored once: (p, K) float16.
    once = 0 if method == "gptvq" else alone[0].codebook.right.nbytes
    assert tensor.num_bytes == sum(t.num_bytes for t in alone) - once * (GROUPS - 1)
    # The Hessians differ, so a group's codes are not what another group's Hessian gives.
    if method != "rtn":
        other = quantize_layer(quantize, settings, weight, objectives[::-1], KEY, asymmetry)
        assert not np.array_equal(other.codes, tensor.codes)


def test_one_group_is_the_whole_layer():
    weight, objectives = layer()
    o = objectives[0]._replace(shift=None)
    tensor = quantize_layer(METHODS["gptvq"].quantize, FAST, weight, [o], KEY)
    expected = METHODS["gptvq"].quantize(weight, o.hessian, o.factor.hinv_chol, KEY, FAST)
    for one, other in zip(jax.tree.leaves(tensor), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_inputs_that_were_dead_in_one_group_are_zero_there_only():
    weight, objectives = layer()
    alive = jnp.arange(COLS) != 5
    hessian = objectives[1].hessian * alive * alive[:, None]
    objectives[1] = Objective(hessian, factorize(hessian, 0.01))
    uniform = UniformSettings(bits=4, group_size=1)
    tensor = quantize_layer(METHODS["gptq"].quantize, uniform, weight, objectives, KEY)
    column = np.asarray(run_dequantize(tensor))[:, 5]
    assert not column[8:16].any() and column[:8].all() and column[16:].all()


def random_tensor(bits, rows, seed):
    """Strips of 2 rows and 4 columns; contents as a file may hold them."""
    rng = np.random.default_rng(seed)
    settings = GPTVQSettings(dim=2, bits=1.5, group_size=8, max_group_cols=4)
    grid = dataclasses.replace(settings.grid(rows, 12), strip_rows=2)
    groups = (1, grid.col_strips, grid.row_strips)
    scale = None if bits == 16 else rng.uniform(0.1, 1, groups).astype(np.float16)
    if bits == 4:
        centroids = rng.integers(0, 256, (*groups, 8), np.uint8)
    elif bits == 8:
        centroids = rng.integers(-128, 128, (*groups, 8, 2), np.int8)
    else:
        centroids = rng.normal(size=(*groups, 8, 2)).astype(np.float16)
    codes = rng.integers(0, 256, (1, rows, 3), np.uint8)  # 6 codes of 3 bits in a row
    row_scales = rng.uniform(0.5, 2, rows).astype(np.float16) if bits == 16 else None  # as AQLM's
    codebook = DenseCodebook(centroids, scale, bits, 8, 2)
    return VQTensor(codes, codebook, None, 3, grid, row_scales)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_stacked_codes_and_codebooks_are_where_they_belong(bits):
    """The last tensor may be of any height, the others are whole strips."""
    tensors = [random_tensor(bits, rows, seed) for seed, rows in enumerate((4, 2, 3))]
    stacked = concat_rows(tensors)
    assert stacked.shape == (9, 12) and stacked.grid.row_strips == 2 + 1 + 2
    np.testing.assert_array_equal(stacked.codes, np.concatenate([t.codes for t in tensors], 1))
    if bits == 16:
        row_scales = np.concatenate([t.row_scales for t in tensors])
        np.testing.assert_array_equal(stacked.row_scales, row_scales)
    for k, (start, t) in enumerate(zip((0, 2, 3), tensors, strict=True)):
        strips = slice(start, start + t.grid.row_strips)
        values = stacked.codebook.values()[:, :, strips]
        np.testing.assert_array_equal(values, t.codebook.values(), err_msg=str(k))
    expected = np.concatenate([run_dequantize(t) for t in tensors])
    np.testing.assert_array_equal(run_dequantize(stacked), expected)
    assert stacked.num_bytes == sum(t.num_bytes for t in tensors)


def test_rows_that_end_inside_a_strip_are_an_error():
    tensors = [random_tensor(8, rows, seed=0) for rows in (3, 4)]
    with pytest.raises(ValueError, match="3 rows do not divide into strips of 2.*gradient_groups"):
        concat_rows(tensors)
    # 13 x 8 weights in groups of 16: at most 6 row strips, so 3 rows each, which 13 rows are not.
    shapes = {"v_proj": (12, 8), "q_proj": (26, 8)}
    small, large = (dataclasses.replace(FAST, group_size=size) for size in (16, 1000))
    check_row_groups(shapes, [large], 2)
    check_row_groups(shapes, [large, small], 1)
    message = "gradient_groups=2: the 13 rows of a group of q_proj are not whole strips of 3 rows"
    with pytest.raises(ValueError, match=message):
        check_row_groups(shapes, [large, small], 2)


def test_what_all_rows_share_cannot_be_stacked():
    tensor, groups = random_tensor(8, 4, seed=0), (1, 3, 2)
    codes, steps = np.zeros((4, 3, 1), np.uint8), np.ones(3, np.float16)
    scales = BlockScales(codes, steps, steps, block_size=4, blocks=1)
    int8 = FactoredCodebook(
        np.ones((*groups, 1), np.int8), np.ones(1, np.float16), np.ones((1, 8), np.float16)
    )
    float16 = FactoredCodebook(np.ones((*groups, 1), np.float16), None, np.ones((1, 8), np.float16))
    other = dataclasses.replace(float16, right=2 * float16.right)
    for change, second in [
        ({"block_scales": scales}, {"block_scales": scales}),
        ({"codebook": int8}, {"codebook": int8}),
        ({"codebook": float16}, {"codebook": other}),
    ]:
        tensors = [dataclasses.replace(tensor, **kw) for kw in (change, second)]
        with pytest.raises(NotImplementedError, match=r"calibration\.gradient_groups to 1"):
            concat_rows(tensors)
        assert concat_rows(tensors[:1]) is tensors[0]  # alone it is fine


def test_losses_and_relative_error_in_float64():
    weight, objectives = layer()
    quantized = jnp.round(weight)
    parts = [
        (np.asarray(w), np.asarray(q), np.asarray(o.hessian))
        for w, q, o in zip(
            np.split(weight, GROUPS), np.split(quantized, GROUPS), objectives, strict=True
        )
    ]
    expected = [ref.loss(w, q, h) for w, q, h in parts]
    np.testing.assert_allclose(losses(weight, quantized, objectives), expected, rtol=1e-5)
    signal = sum(ref.loss(w, 0 * w, h) for w, _, h in parts)
    error = relative_error(weight, quantized, objectives)
    assert error == pytest.approx(sum(expected) / signal, rel=1e-5)
    assert relative_error(weight, weight, objectives) == 0
    silent = [o._replace(hessian=0 * o.hessian) for o in objectives]
    assert relative_error(weight, quantized, silent) == 0


def test_row_groups_are_contiguous():
    parts = row_groups(jnp.arange(12).reshape(6, 2), 3)
    np.testing.assert_array_equal(parts, np.arange(12).reshape(3, 2, 2))
