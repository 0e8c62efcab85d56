"""The GPU kernel in interpret mode: its arithmetic. test_compile_gpu.py compiles it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real_shapes
from base import CASES as ALL_CASES
from base import TRELLIS, MatmulTests, decoded, relative_error, tensor_of
from float64 import decode

from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.vq_tensor import FactoredCodebook
from gptvq_jax.ops import pallas_gpu, vq_matmul
from gptvq_jax.ops.gpu import layout
from gptvq_jax.ops.pallas_gpu import Tile
from gptvq_jax.study.sample_tensors import TensorFormat, random_tensor

CASES = tuple(case for case in ALL_CASES if case not in TRELLIS)  # codes of centroids
# What CASES do not have. Formats and grids (rows, columns, D, rows and columns of a strip).
SHAPES = {
    "odd D": (TensorFormat(3, 5), GroupGrid(20, 91, 3, 7, 30)),
    "D = 5, 2 codebooks": (TensorFormat(5, 4, num_codebooks=2), GroupGrid(16, 80, 5, 4, 40)),
    "codes across words": (TensorFormat(1, 11, codebook_bits=16), GroupGrid(16, 65, 1, 16, 65)),
    "strips of one vector": (TensorFormat(2, 2), GroupGrid(9, 26, 2, 1, 2)),
    "one row": (TensorFormat(2, 4), GroupGrid(1, 64, 2, 1, 64)),
    "block scales of 3 vectors": (
        TensorFormat(2, 4, scale_block_size=6),
        GroupGrid(16, 130, 2, 5, 50),
    ),
    "2 factored codebooks": (
        TensorFormat(1, 4, rank=2, num_codebooks=2),
        GroupGrid(8, 96, 1, 3, 32),
    ),
}
# "2d 4 bit" has 40 rows and 64 chunks: programs past the last row, past the last chunk, and both.
TILES = {
    "one program": Tile(64, 64, 1, 1, 1, False),
    "several steps": Tile(16, 16, 2, 2, 2, False),
    "a split past the end": Tile(32, 16, 3, 3, 2, False),
    "tensor cores, several steps": Tile(16, 16, 2, 2, 16, True),
    "tensor cores, blocks of rows of x": Tile(64, 32, 1, 3, 16, True),
}


# In bfloat16 the tile differs, not how codes and centroids are read: CI runs the others.
BFLOAT16 = ("1d 4 bit, ragged", "2d 2 bit, strips of 192", "4d 2 bit", "svd", "aqlm 2x8")
BFLOAT16 += ("block scales, ragged",)


def slow_unless(cases, chosen):
    """Test parameters, of which all but the chosen are slow."""
    return [
        pytest.param(case, marks=() if case in chosen else pytest.mark.slow, id=case)
        for case in cases
    ]


def interpreted(function):
    """Compiled for one run."""
    # A kernel is one large expression, which takes the compiler long to optimize.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@interpreted
def product(x, packed):
    return pallas_gpu.matmul(x, packed, interpret=True)


@interpreted
def kernel_product(x, kernel):
    return x @ kernel


def error(x, y, expected_weight):
    assert y.shape == (x.shape[0], expected_weight.shape[0])
    assert y.dtype == jnp.float32
    return relative_error(y, np.asarray(x, np.float64) @ expected_weight.T)


def random_x(batch, cols, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(batch).normal(size=(batch, cols)), dtype)


class TestPallasGPU(MatmulTests):
    implementation = "pallas_gpu"
    supported = tuple(ALL_CASES)

    def run(self, x, tensor):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pallas_gpu, "matmul", partial(pallas_gpu.matmul, interpret=True))
            return kernel_product(x, vq_matmul.pack(tensor, "pallas_gpu"))

    @pytest.mark.parametrize("case", slow_unless(ALL_CASES, (*CASES, TRELLIS[1])))
    def test_float32_agrees_with_float64(self, case):
        # Programs take two rows of x: 3 make two programs, one of them with padding.
        self._compare(case, 3, jnp.float32, self.float32_error)

    @pytest.mark.parametrize("case", slow_unless((*CASES, *TRELLIS[:2]), BFLOAT16))
    def test_bfloat16_agrees_with_float64(self, case):
        self._compare(case, 20, jnp.bfloat16, self.bfloat16_error)

    @pytest.mark.parametrize("batch", [1, 2, 64, 65])
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
    def test_batches(self, batch, dtype):
        tolerance = self.float32_error if dtype == jnp.float32 else self.bfloat16_error
        self._compare("4d 2 bit", batch, dtype, tolerance)

    def test_no_rows(self):
        assert self.run(jnp.zeros((0, 512)), tensor_of("4d 2 bit")).shape == (0, 40)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("case", ["2d 3 bit, ragged", "aqlm 2x8"])
def test_few_rows_of_bfloat16_lose_nothing(case, batch):
    tensor = tensor_of(case).take_row_scales()[0]
    x = random_x(batch, tensor.shape[1], jnp.bfloat16)
    assert error(x, product(x, pallas_gpu.pack(tensor)), decode(tensor)) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    tensor = random_tensor(*SHAPES[shape])
    x = random_x(2, tensor.shape[1])
    assert error(x, product(x, pallas_gpu.pack(tensor)), decode(tensor)) < 1e-5


@pytest.mark.parametrize("shape", slow_unless(SHAPES, ["odd D", "codes across words"]))
def test_shapes_in_bfloat16(shape):
    tensor = random_tensor(*SHAPES[shape])
    x = random_x(3, tensor.shape[1], jnp.bfloat16)
    assert error(x, product(x, pallas_gpu.pack(tensor)), decode(tensor)) < 2e-2


@pytest.mark.parametrize("tile", TILES)
def test_tiles(tile):
    tile = TILES[tile]
    tensor = tensor_of("2d 4 bit")
    x = random_x(20 if tile.tensor_cores else 3, tensor.shape[1])
    if tile.tensor_cores:
        x = x.astype(jnp.bfloat16)
    run = interpreted(lambda x, w: pallas_gpu.run_kernel(x, w, tile, interpret=True))
    y = run(x, pallas_gpu.pack(tensor))
    assert error(x, y, decoded("2d 4 bit")) < (2e-2 if tile.tensor_cores else 1e-5)


def test_spare_codes_stay_inside():
    # 5 centroids, 3 bits: the spare bits at the end of a row may say 7.
    tensor = random_tensor(TensorFormat(2, 3), GroupGrid(8, 10, 2, 8, 10))
    book = tensor.codebook
    book = dataclasses.replace(book, centroids=book.centroids[..., :5, :], codebook_size=5)
    codes = np.full_like(tensor.codes, 0xFF)
    codes[..., 0], codes[..., 1] = 0b01000100, 0b11000010  # 4, 0, 1, 1, 4, then ones
    tensor = dataclasses.replace(tensor, codes=codes, codebook=book)
    np.testing.assert_array_equal(tensor.unpack_codes()[0, 0], [4, 0, 1, 1, 4])
    x = random_x(2, 10)
    assert error(x, product(x, pallas_gpu.pack(tensor)), decode(tensor)) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_unpack_is_the_same_weight(case):
    tensor = tensor_of(case).take_row_scales()[0]
    again = layout.unpack(pallas_gpu.pack(tensor))
    np.testing.assert_array_equal(again.codes, tensor.codes)
    # Exact, but for scales that moved from one factor to the other.
    tolerance = 1e-7 if isinstance(tensor.codebook, FactoredCodebook) else 0
    expected = tensor.codebook.values()
    np.testing.assert_allclose(again.codebook.values(), expected, rtol=tolerance, atol=tolerance)
    assert again.block_scales is tensor.block_scales


@pytest.mark.parametrize("fmt", real_shapes.FORMATS)
@pytest.mark.parametrize("shape", real_shapes.SHAPES)
def test_stays_packed(fmt, shape):
    tensor = real_shapes.abstract_tensor(real_shapes.FORMATS[fmt], *shape)
    packed = jax.eval_shape(pallas_gpu.pack, tensor)
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(packed))
    # float16 takes twice the bytes of int8 centroids, four times those of int4.
    limit = 1.4 if "int4" in fmt else 1.15
    assert num_bytes <= limit * tensor.num_bytes


@pytest.mark.parametrize("batch", [1, 2, 3, 16, 64])
@pytest.mark.parametrize("shape", real_shapes.SHAPES)
def test_programs_cover_the_weight(shape, batch):
    tensor = real_shapes.abstract_tensor(real_shapes.FORMATS["2d 2 bit"], *shape)
    plan = jax.eval_shape(pallas_gpu.pack, tensor).layout
    tile = pallas_gpu.choose_tile(plan, batch, jnp.bfloat16)
    chunks = tile.splits * tile.steps * tile.chunks
    assert plan.chunks <= chunks < plan.chunks + (tile.splits + tile.steps) * tile.chunks
    programs = -(-shape[0] // tile.rows) * tile.splits
    assert 132 <= programs <= 1024  # every SM of an H100 has work


def test_tables_beyond_32_bits_are_refused():
    tensor = real_shapes.abstract_tensor(TensorFormat(2, 4, 1024), 4096, 4096)
    centroids = jax.ShapeDtypeStruct((1, 16, 2**23, 16, 2), jnp.int8)
    scale = jax.ShapeDtypeStruct(centroids.shape[:3], jnp.float16)
    book = dataclasses.replace(tensor.codebook, centroids=centroids, scale=scale)
    with pytest.raises(NotImplementedError, match="64-bit indices"):
        pallas_gpu.check(dataclasses.replace(tensor, codebook=book))
