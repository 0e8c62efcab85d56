"""The TPU kernel compiled for chips that are not there: needs the package libtpu, not a TPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from real_shapes import FORMATS, abstract_tensor, first_device, placed, trellis_tensor

from gptvq_jax.moves.viterbi import search_streams
from gptvq_jax.ops import pallas_tpu
from gptvq_jax.ops.column_frame import Block
from gptvq_jax.ops.tpu import columns

pytest.importorskip("libtpu")

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2"}
# (format, rows, columns, batch, dtype)
PROGRAMS = [
    ("2d 2 bit", 4096, 4096, 1, jnp.bfloat16),
    ("2d 2 bit", 4096, 4096, 1, jnp.float32),
    ("2d 2 bit", 4096, 11008, 16, jnp.bfloat16),
    ("2d 2 bit", 8192, 28672, 64, jnp.bfloat16),
    ("2d 2 bit", 4096, 4096, 600, jnp.bfloat16),
    ("2d 3 bit", 4096, 4096, 1, jnp.bfloat16),
    ("2d 3 bit", 576, 1536, 1, jnp.bfloat16),
    ("2d 4 bit", 4096, 4096, 8, jnp.bfloat16),
    ("4d 2 bit", 4096, 4096, 1, jnp.bfloat16),
    ("4d 2 bit", 11008, 4096, 64, jnp.float32),
    ("1d 3 bit", 4096, 4096, 1, jnp.bfloat16),
    ("1d 3 bit", 8192, 28672, 1, jnp.float32),
    ("aqlm 2x8", 4096, 4096, 1, jnp.bfloat16),
    ("aqlm 2x8", 4096, 4096, 32, jnp.float32),
    ("2d 2 bit, int4 centroids", 4096, 4096, 1, jnp.bfloat16),
    ("uniform 4 bit", 4096, 4096, 1, jnp.bfloat16),
]


@functools.cache
def chip(name):
    """Placement on one chip that is described, not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[name])
    return first_device(topology)


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize(("fmt", "rows", "cols", "batch", "dtype"), PROGRAMS)
def test_compiles(fmt, rows, cols, batch, dtype, name):
    tensor = abstract_tensor(FORMATS[fmt], rows, cols)
    packed = placed(jax.eval_shape(pallas_tpu.pack, tensor), chip(name))
    x = placed(jax.ShapeDtypeStruct((batch, cols), dtype), chip(name))
    program = jax.jit(pallas_tpu.matmul).trace(x, packed).lower(lowering_platforms=("tpu",))
    memory = program.compile().memory_analysis()
    # Tiles of registers fill up no array: what is counted is what is there.
    expected = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((x, packed)))
    assert memory.argument_size_in_bytes <= 1.01 * expected + 8 * x.dtype.itemsize * cols


@pytest.mark.parametrize("name", CHIPS)
def test_pack_compiles(name):
    tensor = abstract_tensor(FORMATS["2d 3 bit"], 4096, 4096)
    pack = jax.jit(pallas_tpu.pack)
    pack.trace(placed(tensor, chip(name))).lower(lowering_platforms=("tpu",)).compile()


@functools.cache
def packed_trellis(bits, level_bits):
    tensor = trellis_tensor(bits, level_bits)
    pallas_tpu.check(tensor)
    return pallas_tpu.pack(tensor)


@pytest.mark.parametrize("name", ["v5e", "v6e"])
@pytest.mark.parametrize(
    ("bits", "level_bits", "batch", "dtype"),
    [
        (8, 0, 1, jnp.bfloat16),
        (8, 0, 16, jnp.bfloat16),
        (8, 0, 1, jnp.float32),
        (12, 0, 1, jnp.bfloat16),
        (12, 0, 16, jnp.bfloat16),
        (12, 8, 1, jnp.bfloat16),
        (12, 8, 1, jnp.float32),
    ],
)
def test_trellis_compiles(bits, level_bits, batch, dtype, name):
    packed = packed_trellis(bits, level_bits)
    x = placed(jax.ShapeDtypeStruct((batch, 4096), dtype), chip(name))
    program = jax.jit(pallas_tpu.matmul).trace(x, placed(packed, chip(name)))
    compiled = program.lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
    # Nothing is decoded outside of the kernel: x by blocks, results by tiles, and outliers.
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 4096 * 128
    expected = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((x, packed)))
    assert memory.argument_size_in_bytes <= 1.01 * expected + 8 * x.dtype.itemsize * 4096


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize(
    ("bits", "rows", "streams", "known"),
    [
        (12, 256, 16, False),
        (4, 8, 1, False),
        (8, 256, 112, False),
        (10, 1024, 11, False),
        (12, 3200, 2, False),
        (16, 256, 43, False),
        (12, 256, 16, True),
    ],
)
def test_viterbi_compiles_at_every_rate(bits, rows, streams, known, name):
    shapes = [(streams, rows)] * 2 + [(2**bits,)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    integers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in [(), (streams,)][: 1 + known]]
    args = placed((*arrays, *integers), chip(name))
    search = jax.jit(functools.partial(search_streams, native="pallas_tpu"))
    program = search.trace(*args).lower(lowering_platforms=("tpu",)).compile()
    kernels = min(6, bits)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == kernels
    # Neither costs nor the way back are outside of the chip's own memory: padded streams at most.
    padded = 4 * (streams + 7) * (rows + 127)
    assert program.memory_analysis().temp_size_in_bytes <= 8 * padded + 8 * 2**bits


@pytest.mark.parametrize("name", ["v5e", "v6e"])
@pytest.mark.parametrize(("dim", "size", "groups"), [(2, 16, 128), (4, 256, 4)])
def test_a_block_of_columns_compiles(dim, size, groups, name):
    cols, rows = 512, 1024
    vectors = cols // dim

    def floats(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def swept(start, values, matrix, tables, books, codes, loss):
        block = Block(128, start, values, matrix, tables, books, None, 256)
        return columns.sweep(block, codes, loss, rows)

    def recoded(start, values, matrix, tables, books, codes, scale):
        block = Block(128, start, values, matrix, tables, books, scale, 256)
        return columns.recode(block, codes)

    table, books = floats(vectors, dim, dim), floats(1, groups, size, dim)
    codes = jax.ShapeDtypeStruct((vectors, rows), jnp.int32)
    shared = jax.ShapeDtypeStruct((), jnp.int32), floats(cols, rows), floats(cols, cols)
    for move, tables, last in [(swept, 2, floats(rows)), (recoded, 3, floats(vectors, rows))]:
        args = placed((*shared, (table,) * tables, books, codes, last), chip(name))
        program = jax.jit(move).trace(*args).lower(lowering_platforms=("tpu",)).compile()
        assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1
