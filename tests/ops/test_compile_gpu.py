"""The GPU programs compiled for an H100 that is not there: needs the CUDA plugin, not a GPU.

pip install jax-cuda13-plugin jax-cuda13-pjrt && JAX_PLATFORMS=cpu python -m pytest THIS_FILE
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    use_abstract_mesh,
)
from launches import launches
from real_shapes import FORMATS, abstract_tensor, first_device, placed, trellis_tensor

from gptvq_jax.core.vq_tensor import BlockScales
from gptvq_jax.methods.gptvq_settings import GPTVQSettings
from gptvq_jax.moves.em import GroupData, em
from gptvq_jax.moves.recode import recode
from gptvq_jax.moves.residual import Residual
from gptvq_jax.moves.seed import kmeans_plus_plus
from gptvq_jax.moves.sweep import sweep
from gptvq_jax.moves.viterbi import search_streams
from gptvq_jax.ops import pallas_gpu, xla
from gptvq_jax.ops.gpu import trellis
from gptvq_jax.study.sample_tensors import TensorFormat

pytest.importorskip("jax_cuda13_plugin")
# From JAX 0.11 on; why Triton all the same is written in pallas_gpu.py.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

TARGET = Path(__file__).with_name("h100_target.txtpb")
EXTRA_FORMATS = {
    "aqlm 1x16": TensorFormat(8, 16, codebook_bits=16),
    "2d 2.5 bit": TensorFormat(2, 5, 2048),
    "2d 2 bit, float16 centroids": TensorFormat(2, 4, 1024, codebook_bits=16),
    "svd": TensorFormat(1, 3, 512, rank=2),
}
# (format, rows, columns, batch, dtype)
PROGRAMS = [
    ("2d 2 bit", 4096, 4096, 1, jnp.bfloat16),
    ("2d 2 bit", 8192, 28672, 1, jnp.bfloat16),
    ("2d 2 bit", 4096, 4096, 1, jnp.float32),
    ("2d 2 bit", 4096, 4096, 2, jnp.float16),
    ("2d 2 bit", 4096, 4096, 16, jnp.bfloat16),
    ("2d 2 bit", 11008, 4096, 16, jnp.float16),
    ("2d 2 bit", 8192, 28672, 64, jnp.bfloat16),
    ("2d 2 bit", 4096, 4096, 64, jnp.float32),
    ("2d 2 bit", 576, 1536, 1, jnp.bfloat16),
    ("2d 2 bit", 576, 1536, 16, jnp.bfloat16),
    ("2d 2 bit, int4 centroids", 4096, 4096, 1, jnp.bfloat16),
    ("2d 2 bit, float16 centroids", 4096, 4096, 1, jnp.bfloat16),
    ("2d 2.5 bit", 4096, 4096, 1, jnp.bfloat16),
    ("2d 3 bit", 4096, 4096, 1, jnp.bfloat16),
    ("2d 3 bit", 4096, 11008, 16, jnp.bfloat16),
    ("2d 4 bit", 4096, 4096, 1, jnp.bfloat16),
    ("4d 2 bit", 4096, 4096, 1, jnp.bfloat16),
    ("4d 2 bit", 4096, 4096, 16, jnp.bfloat16),
    ("1d 3 bit", 4096, 4096, 1, jnp.bfloat16),
    ("1d 3 bit", 4096, 4096, 16, jnp.bfloat16),
    ("uniform 4 bit", 4096, 4096, 1, jnp.bfloat16),
    ("svd", 4096, 4096, 16, jnp.bfloat16),
    ("aqlm 2x8", 4096, 4096, 1, jnp.bfloat16),
    ("aqlm 2x8", 4096, 4096, 16, jnp.bfloat16),
    ("aqlm 1x16", 4096, 4096, 1, jnp.bfloat16),
    ("aqlm 1x16", 4096, 4096, 16, jnp.bfloat16),
]


@functools.cache
def h100():
    """Placement on one GPU that is described, not there."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
    )
    return first_device(topology)


def compiled(function, *args):
    """The program for args of jax.ShapeDtypeStruct."""
    # Triton asks which GPU it lowers for.
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    args = placed(args, h100())
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
    return lowered.compile()


def tensor_of(name, rows, cols):
    return abstract_tensor((FORMATS | EXTRA_FORMATS)[name], rows, cols)


@pytest.mark.parametrize(("name", "rows", "cols", "batch", "dtype"), PROGRAMS)
def test_kernel(name, rows, cols, batch, dtype):
    packed = jax.eval_shape(pallas_gpu.pack, tensor_of(name, rows, cols))
    program = compiled(pallas_gpu.matmul, jax.ShapeDtypeStruct((batch, cols), dtype), packed)
    assert "vq_matmul" in program.as_text()
    # Of the decoded weight nothing is stored: only partial sums and x rearranged.
    tile = pallas_gpu.choose_tile(packed.layout, batch, dtype)
    chunks = tile.splits * tile.steps * tile.chunks
    padded_batch = -(-batch // tile.batch) * tile.batch
    expected = 4 * padded_batch * (tile.splits * (rows + 63) + chunks * packed.layout.chunk_cols)
    assert program.memory_analysis().temp_size_in_bytes <= expected + 4096


@pytest.mark.parametrize("batch", [1, 16])
def test_kernel_with_block_scales(batch):
    # 16 weights share a scale: 16 blocks in a strip of 256 columns, in 8 bytes.
    shapes = ((4096, 16, 8), jnp.uint8), ((16,), jnp.float16), ((16,), jnp.float16)
    scales = BlockScales(*(jax.ShapeDtypeStruct(*shape) for shape in shapes), 16, 16)
    tensor = dataclasses.replace(tensor_of("2d 2 bit", 4096, 4096), block_scales=scales)
    packed = jax.eval_shape(pallas_gpu.pack, tensor)
    compiled(pallas_gpu.matmul, jax.ShapeDtypeStruct((batch, 4096), jnp.bfloat16), packed)


def test_many_rows_are_decoded_once():
    packed = jax.eval_shape(pallas_gpu.pack, tensor_of("2d 2 bit", 4096, 4096))
    program = compiled(pallas_gpu.matmul, jax.ShapeDtypeStruct((512, 4096), jnp.bfloat16), packed)
    assert "vq_matmul" not in program.as_text()


@functools.cache
def packed_trellis(bits):
    tensor = trellis_tensor(bits)
    pallas_gpu.check(tensor)
    return pallas_gpu.pack(tensor)


@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize(
    ("batch", "dtype"),
    [(1, jnp.bfloat16), (2, jnp.float16), (16, jnp.bfloat16), (16, jnp.float32)],
)
def test_trellis(bits, batch, dtype):
    packed = packed_trellis(bits)
    program = compiled(pallas_gpu.matmul, jax.ShapeDtypeStruct((batch, 4096), dtype), packed)
    assert "trellis_matmul" in program.as_text()
    # Of the decoded weight nothing is stored: only partial sums, x rearranged and outliers.
    tile = trellis.choose_tile(packed.layout, batch, dtype)
    expected = 4 * batch * (tile.splits * 4096 + 4 * packed.layout.cols + 4 * 4096)
    assert program.memory_analysis().temp_size_in_bytes <= expected + 4096


def test_many_rows_of_trellis_codes_are_decoded_once():
    x = jax.ShapeDtypeStruct((512, 4096), jnp.bfloat16)
    assert "trellis_matmul" not in compiled(pallas_gpu.matmul, x, packed_trellis(8)).as_text()


@pytest.mark.parametrize("name", ["2d 2 bit", "2d 3 bit", "4d 2 bit", "1d 3 bit", "aqlm 2x8"])
def test_xla_stores_no_decoded_weight(name):
    rows, cols = 4096, 4096
    x = jax.ShapeDtypeStruct((1, cols), jnp.bfloat16)
    program = compiled(xla.matmul, x, tensor_of(name, rows, cols))
    # An eighth of what it would take in bfloat16: centroids in float32 may be there.
    assert program.memory_analysis().temp_size_in_bytes < rows * cols / 4


@pytest.mark.parametrize(
    ("bits", "rows", "streams", "known"),
    [
        (12, 256, 16, False),
        (4, 8, 1, False),
        (8, 256, 112, False),
        (10, 1024, 11, False),
        (14, 256, 4, False),
        (12, 256, 16, True),
    ],
)
def test_viterbi_compiles_at_every_rate(bits, rows, streams, known):
    shapes = [(streams, rows)] * 2 + [(2**bits,)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    integers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in [(), (streams,)][: 1 + known]]
    search = functools.partial(search_streams, native="pallas_gpu")
    program = compiled(search, *arrays, *integers)
    assert program.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == min(6, bits)
    # Costs stay on the chip; the way back takes a byte for each minimum, of the lowest rate most.
    way_back = streams * rows * 2 ** (bits - 1)
    assert program.memory_analysis().temp_size_in_bytes <= way_back + 16 * streams * rows + 4096


# Llama-2-70B's widest layer. `study.plan.traffic` has the counts that are held here.
TWO = GPTVQSettings(dim=2, bits=2.0, group_size=2048)
FOUR = GPTVQSettings(dim=4, bits=2.0, group_size=65536)
ROWS, COLS = 8192, 28672


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def strip_of(settings):
    """Data of one column strip, as abstract arrays, and its codebooks."""
    grid = settings.grid(ROWS, COLS)
    groups, positions, dim, rows = grid.row_strips, grid.strip_vectors, grid.dim, grid.strip_rows
    data = GroupData(
        floats(groups, positions, dim, rows),
        floats(positions, dim, dim),
        floats(groups, positions, rows),
    )
    return data, floats(groups, settings.codebook_size, dim)


@pytest.mark.parametrize("settings", [TWO, FOUR], ids=["2d", "4d"])
def test_a_sweep_launches_a_few_kernels_for_each_block(settings):
    """Not some for each vector: 14336 in 2D. One is ours, one the product."""
    grid = settings.grid(ROWS, COLS)
    weight, square = floats(COLS, ROWS), floats(COLS, COLS)
    books = floats(grid.row_strips, settings.codebook_size, grid.dim)

    def swept(weight, hinv_chol, books):
        result = sweep(
            *(weight, hinv_chol, grid, lambda data, keys: books, jax.random.key(0)),
            native="pallas_gpu",
        )
        return result.codes, result.centroids, result.loss

    program = compiled(swept, weight, square, books)
    text = program.as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 1
    blocks, strips = COLS // 128, COLS // 256
    assert launches(text) <= 5 * blocks + 6 * strips + 32
    # Nothing of the size of the weight or of U is copied, but for the weight that changes.
    assert program.memory_analysis().temp_size_in_bytes < 1.1 * 4 * ROWS * COLS


@pytest.mark.parametrize("settings", [TWO, FOUR], ids=["2d", "4d"])
def test_a_recode_launches_a_few_kernels_for_each_block(settings):
    grid = settings.grid(ROWS, COLS)
    weight, square = floats(COLS, ROWS), floats(COLS, COLS)
    books = floats(1, grid.col_strips, grid.row_strips, settings.codebook_size, grid.dim)
    codes = jax.ShapeDtypeStruct((1, COLS // grid.dim, ROWS), jnp.int32)

    def recoded(error, image, hessian, books, codes):
        residual = Residual(error, image)
        return recode(residual, hessian, books, codes, None, grid, native="pallas_gpu")

    text = compiled(recoded, weight, weight, square, books, codes).as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 1
    assert launches(text) <= 5 * (COLS // 128) + 32


def test_the_kernel_takes_scales_and_blocks_of_other_widths():
    """96 columns, which fill no power of two, and rows that fill no program."""
    settings = GPTVQSettings(dim=2, bits=2.0, group_size=2048, max_group_cols=192, block_size=96)
    grid = settings.grid(1000, 1536)
    shape = grid.padded_cols, grid.padded_rows
    books = floats(1, grid.col_strips, grid.row_strips, settings.codebook_size, grid.dim)
    vectors = shape[0] // grid.dim
    codes = jax.ShapeDtypeStruct((1, vectors, shape[1]), jnp.int32)

    def recoded(error, image, hessian, books, codes, scales):
        residual, options = Residual(error, image), {"block_size": 96, "native": "pallas_gpu"}
        return recode(residual, hessian, books, codes, scales, grid, **options)

    assert grid.block_cols(96) == 96
    arrays = floats(*shape), floats(*shape), floats(shape[0], shape[0]), books, codes
    compiled(recoded, *arrays, floats(vectors, shape[1]))


def test_a_seed_launches_a_few_kernels():
    """One for each step of a bisection it was: 84."""
    data, _ = strip_of(TWO)

    def seeds(*data):
        keys = jax.random.split(jax.random.key(0), TWO.grid(ROWS, COLS).row_strips)
        return kmeans_plus_plus(GroupData(*data), TWO.codebook_size, keys)

    assert launches(compiled(seeds, *data).as_text()) <= 17 * TWO.codebook_size


@pytest.mark.parametrize(("settings", "most"), [(TWO, 51), (FOUR, 76)], ids=["2d", "4d"])
def test_a_step_of_em_launches_some_dozen_kernels(settings, most):
    data, books = strip_of(settings)
    text = compiled(lambda data, books: em(data, books, 20), data, books).as_text()
    assert launches(text) <= 20 * most
