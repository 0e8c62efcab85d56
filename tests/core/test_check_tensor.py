"""A tensor whose parts contradict each other reaches neither a kernel nor a lookup."""

import dataclasses

import fuzz_checkpoint as fuzz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint as tiny

from gptvq_jax.core.check_tensor import check_tensor, check_values, named_arrays
from gptvq_jax.core.int8_rows import int8_rows
from gptvq_jax.core.row_weight import RowWeight
from gptvq_jax.core.vq_tensor import dequantize
from gptvq_jax.exchange.aqlm_format import AQLMFormat, from_aqlm
from gptvq_jax.ops.cpu import kernels
from gptvq_jax.ops.int4 import random_int4
from gptvq_jax.ops.vq_matmul import make_kernel, pack, vq_matmul

ROWS, COLS = 13, 43
STORED = [
    (kind, name, array.dtype)
    for kind in tiny.KINDS
    if kind != "trellis"  # test_check_trellis.py
    for name, array in named_arrays(tiny.random_tensor(kind, 5, 7))
]
ARRAYS = [(kind, name) for kind, name, _ in STORED]
FLOATS = [(kind, name) for kind, name, dtype in STORED if dtype == np.float16]


def replace(tensor, name, value):
    """The tensor with another array or static field, as in replace(t, "codebook.scale", a)."""
    part, _, field = name.rpartition(".")
    if part:
        value = dataclasses.replace(getattr(tensor, part), **{field: value})
        field = part
    return dataclasses.replace(tensor, **{field: value})


def get(tensor, name):
    for field in name.split("."):
        tensor = getattr(tensor, field)
    return tensor


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_whole_tensors_pass_as_arrays_as_shapes_and_in_a_trace(kind):
    tensor = tiny.random_tensor(kind, ROWS, COLS)
    check_tensor(tensor)
    check_values(tensor)
    jax.eval_shape(lambda t: check_tensor(t), tensor)
    check_tensor(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tensor))


@pytest.mark.parametrize(("kind", "name"), ARRAYS)
def test_an_array_of_another_shape_or_dtype_is_named(kind, name):
    tensor = tiny.random_tensor(kind, ROWS, COLS)
    array = get(tensor, name)
    others = [array[None], array.reshape(-1) if array.ndim > 1 else array[:, None]]
    others += [np.concatenate([array, array], -1), array[..., :0], array.astype(np.int32)]
    others += [array[..., :-1]] if array.shape[-1] > 1 else []
    # The first axis of codes and of the right factor, and no other, say how many there are.
    others += [] if name == "codebook.right" else [np.concatenate([array, array])]
    for other in others:
        with pytest.raises(ValueError, match=r"codes|codebook|scales"):
            check_tensor(replace(tensor, name, other))
    if name not in ("row_scales", "codebook.scale", "codebook.left_scale"):
        with pytest.raises(ValueError, match=f"{name} is missing"):
            check_tensor(replace(tensor, name, None))


@pytest.mark.parametrize("value", [0, -1, 2**31, 2**70, 1.0, True, None, "2", np.int64(2)])
@pytest.mark.parametrize(
    "field", ["index_bits", "codebook.bits", "codebook.codebook_size", "codebook.dim",
              "block_scales.block_size", "block_scales.blocks", "grid"],
)  # fmt: skip
def test_a_static_field_is_an_integer_that_fits(field, value):
    tensor = tiny.random_tensor("int4", ROWS, COLS)
    with pytest.raises(ValueError, match=field):
        check_tensor(replace(tensor, field, value))


@pytest.mark.parametrize(
    ("field", "change"),
    [("rows", 1), ("cols", 8), ("dim", 1), ("strip_rows", 1000), ("strip_cols", 1000)],
)
def test_a_grid_that_is_not_that_of_the_arrays_is_refused(field, change):
    tensor = tiny.random_tensor("int8", ROWS, COLS)
    if field == "dim":
        grid = dataclasses.replace(tensor.grid, dim=1)
    else:
        grid = dataclasses.replace(tensor.grid, **{field: get(tensor.grid, field) + change})
    broken = dataclasses.replace(tensor, grid=grid)
    with pytest.raises(ValueError):
        check_tensor(broken)
    # Every door: the product, one that is prepared, one of a named kernel, the kernel itself.
    x = jnp.ones((1, grid.cols))
    for take in (make_kernel, lambda t: pack(t, "cpu"), lambda t: vq_matmul(x, t),
                 lambda t: kernels.call(t, False)(x), RowWeight.from_int8_rows):  # fmt: skip
        with pytest.raises(ValueError):
            take(broken)


def test_a_tensor_is_checked_where_it_is_traced():
    tensor = tiny.random_tensor("int8", ROWS, COLS)
    short = replace(tensor, "codes", tensor.codes[:, :-1])
    with pytest.raises(ValueError, match=r"codes must be uint8\[1,13,14\], not uint8\[1,12,14\]"):
        jax.eval_shape(lambda x, t: vq_matmul(x, t), jnp.ones((2, COLS)), short)


@pytest.mark.parametrize("name", ["codebook.centroids", "codes"])
def test_lookups_of_dequantize_stay_in_bounds(name):
    tensor = tiny.random_tensor("int8", ROWS, COLS)
    array = get(tensor, name)
    cut = array[:, :, :, :-1] if name == "codebook.centroids" else array[:, :-1]
    with pytest.raises(ValueError, match="need centroids"):
        jax.eval_shape(dequantize, replace(tensor, name, cut))


def test_a_scale_block_wider_than_a_strip_is_the_strip():
    tensor = tiny.random_tensor("1d int8", ROWS, COLS)
    assert tensor.block_scales.blocks == 3
    scales = dataclasses.replace(
        tensor.block_scales, codes=tensor.block_scales.codes[..., :1], block_size=2**30, blocks=1
    )
    wide = dataclasses.replace(tensor, block_scales=scales)
    check_tensor(wide)
    as_wide = dataclasses.replace(scales, block_size=tensor.grid.strip_cols)
    shapes = jax.eval_shape(lambda s: s.per_vector(tensor.grid), scales)
    assert shapes.shape == (ROWS, tensor.grid.padded_cols)
    np.testing.assert_array_equal(scales.per_vector(tensor.grid), as_wide.per_vector(tensor.grid))


@pytest.mark.parametrize(("kind", "name"), FLOATS)
def test_a_number_that_is_not_finite_is_named(kind, name):
    tensor = tiny.random_tensor(kind, ROWS, COLS)
    array = get(tensor, name).copy()
    for bad in (np.nan, np.inf):
        array.flat[-1] = bad
        with pytest.raises(ValueError, match=f"{name} contains NaN or Inf"):
            check_values(replace(tensor, name, array))


def test_block_scales_stay_in_float32():
    tensor = tiny.random_tensor("int4", ROWS, COLS)
    steps = np.full_like(tensor.block_scales.step, 9)
    with pytest.raises(ValueError, match=r"block_scales reach 2\^13[45], beyond float32"):
        check_values(replace(tensor, "block_scales.step", steps))


def test_more_centroids_than_an_index_counts_are_refused():
    tensor = fuzz.random_tensor(fuzz.FORMATS[-1], fuzz.FORMATS[-1].grid(4, 32), 0)
    books = 2**21  # x 2^11 centroids

    def many(array, axis):
        shape = list(array.shape)
        shape[axis] = books
        return jax.ShapeDtypeStruct(shape, array.dtype)

    tensor = replace(tensor, "codes", many(tensor.codes, 0))
    tensor = replace(tensor, "codebook.centroids", many(tensor.codebook.centroids, 0))
    with pytest.raises(ValueError, match="centroids are more than 2147483647"):
        check_tensor(tensor)


def test_int4_products_check_their_shapes():
    kernel = random_int4(4, 256)
    x = jnp.ones((1, 256))
    for codes, scale in ((kernel.codes[:, :64], kernel.scale), (kernel.codes, kernel.scale[:3])):
        with pytest.raises(ValueError, match=r"columns|not of one weight"):
            kernels.int4_matmul(x, codes, scale)


def test_an_aqlm_layer_is_checked():
    fmt = AQLMFormat(1, 4, 4)
    codes = np.zeros((3, 2, 1), np.int8)
    books, scales = np.ones((1, 16, 1, 4), np.float16), np.ones((3, 1, 1, 1), np.float16)
    check_tensor(from_aqlm(fmt, codes, books, scales))
    books[0, 3, 0, 1] = np.inf
    with pytest.raises(ValueError, match="codebook.centroids contains NaN or Inf"):
        from_aqlm(fmt, codes, books, scales)


def test_int8_rows_are_checked():
    rows = int8_rows(np.random.default_rng(0).normal(size=(5, 7)))
    RowWeight.from_int8_rows(rows)
    with pytest.raises(ValueError, match="codes must be"):
        RowWeight.from_int8_rows(replace(rows, "codes", rows.codes[:, :, :-1]))
    scales = tiny.random_tensor("1d int8", 5, 7).block_scales
    with pytest.raises((ValueError, NotImplementedError)):
        RowWeight.from_int8_rows(dataclasses.replace(rows, block_scales=scales))
