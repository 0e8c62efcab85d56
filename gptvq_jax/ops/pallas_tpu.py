"""x W^T on TPUs: one Pallas kernel reads the codes once and decodes them in registers.

This is the one for codes that stand for centroids; that for trellis codes is tpu/trellis.py.

A program takes a tile of some 256 rows of W. It expands the stored centroids of its row strips to
tables in VMEM, then goes through the columns 128 vectors at a time: codes by shift and mask,
weights by a lookup along lanes, and a product with the same columns of x on the MXU.

Bytes: the packed weight once (again for every further 256 rows of x), x and y once. Operations: of
128 vectors of 8 rows (a register), codes take 3 to 9 shifts, masks and ors. Every two of D in
bfloat16, every one in float32, then take a lookup in 128 lanes; K = 256 takes two, and several
column strips within 128 vectors may take as many times more.

Lookups bound it at small batches: in the compiler's schedules one takes some 4 cycles (v5e, v6e) or
5 (v4). With D = 2 and K <= 128 that decodes 2048 weights, which in bfloat16 a v5e reads in 7.5
cycles (819 GB/s at 1.5 GHz) and at 2 bits in 1; with D = 1 or K = 256 it decodes 1024 or fewer, and
the gain is in memory, not in time. These are counts of compiled programs: no TPU has run them.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.core.vq_tensor import VQTensor
from gptvq_jax.ops.tpu import trellis
from gptvq_jax.ops.tpu.codes import pack_codes, pad_axis, read_codes, restore_rows
from gptvq_jax.ops.tpu.layout import LANES, MAX_X_BYTES, SUBLANES, Layout, make_layout
from gptvq_jax.ops.tpu.tables import expand_tables, grouped_loop, lookup, pack_right, pack_tables

KINDS = (VQTensor, TrellisTensor)
_MAX_BATCH_TILE = 256  # decoding once for so many rows of x costs less than the product
_LOOKUPS = 256  # in a step of the loop over columns, about: they hide each other's latency


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTPU:
    """A quantized weight in the layout of the kernel: A x B tiles of rows, `layout.tiles`."""

    codes: jax.Array  # (A, B, M, tile_rows * index_bits / 32, blocks * 128) int32, see codes.py
    tables: jax.Array  # (A, M * book_chunks, group_tile, 128) int8, see tables.py
    right: jax.Array  # (rank, max(K, 128)) float32
    layout: Layout = dataclasses.field(metadata={"static": True})


def check(tensor: QuantizedTensor) -> None:
    """Raises NotImplementedError for a tensor that no kernel can read, with the reason."""
    if isinstance(tensor, TrellisTensor):
        trellis.check(tensor)
    elif tensor.index_bits > 8:
        lookups = 2**tensor.index_bits // LANES
        raise NotImplementedError(
            f"codes of {tensor.index_bits} bits would take {lookups} lookups of {LANES} lanes"
        )
    elif tensor.block_scales is not None:
        raise NotImplementedError("block scales would take two more lookups for every vector")
    else:
        make_layout(tensor)


def pack(tensor: QuantizedTensor) -> PackedTPU | trellis.PackedTrellis:
    """Rearranges codes and centroids, once; as packed as they were, but for padding."""
    return trellis.pack(tensor) if isinstance(tensor, TrellisTensor) else pack_codebooks(tensor)


@jax.jit
def pack_codebooks(tensor: VQTensor) -> PackedTPU:
    """`pack` of codes that stand for centroids."""
    layout = make_layout(tensor)
    return PackedTPU(
        pack_codes(tensor.unpack_codes(), layout),
        pack_tables(tensor.codebook, layout),
        pack_right(tensor.codebook, layout),
        layout,
    )


def matmul(
    x: jax.Array, packed: PackedTPU | trellis.PackedTrellis, *, interpret=False
) -> jax.Array:
    """x (N, C), weight of shape (R, C) -> (N, R) float32.

    Args:
      x: bfloat16 is multiplied by weights rounded to bfloat16, other types in float32.
      packed: of `pack`.
      interpret: as of pl.pallas_call.
    """
    if isinstance(packed, trellis.PackedTrellis):
        return trellis.matmul(x, packed, interpret=interpret)
    layout, batch = packed.layout, x.shape[0]
    narrow = x.dtype == jnp.bfloat16
    x, batch_tile = _arrange(x if narrow else x.astype(jnp.float32), layout)
    dim, rows = layout.grid.dim, layout.table_rows
    parts = layout.num_codebooks * (-(-dim // 2) if narrow else dim)
    table = (parts, layout.centroid_chunks, rows, LANES)
    numbers = (max(1, layout.factors), -(-layout.grid.col_strips // LANES), rows, LANES)
    lanes, first, width = layout.table_lanes()
    y = pl.pallas_call(
        partial(_kernel, layout=layout, width=width),
        grid=(x.shape[0] // batch_tile, *layout.tiles),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec(lanes.shape, lambda n, a, b: (0, 0)),
            pl.BlockSpec((1, 1, *packed.codes.shape[2:]), lambda n, a, b: (a, b, 0, 0, 0)),
            pl.BlockSpec((1, *packed.tables.shape[1:]), lambda n, a, b: (a, 0, 0, 0)),
            pl.BlockSpec(packed.right.shape, lambda n, a, b: (0, 0)),
            # One buffer is enough: x changes once in a pass over the weight.
            pl.BlockSpec(
                (batch_tile, x.shape[1]), lambda n, a, b: (n, 0), pipeline_mode=pl.Buffered(1)
            ),
        ],
        out_specs=pl.BlockSpec((1, 1, batch_tile, layout.tile_rows), lambda n, a, b: (a, b, n, 0)),
        out_shape=jax.ShapeDtypeStruct((*layout.tiles, x.shape[0], layout.tile_rows), jnp.float32),
        scratch_shapes=[
            pltpu.VMEM(table, jnp.int32 if narrow else jnp.float32),
            pltpu.VMEM(numbers, jnp.float32),
        ],
        # The last axis goes in order: its first step makes the tables that the others use.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )(jnp.asarray(first), jnp.asarray(lanes), packed.codes, packed.tables, packed.right, x)
    if narrow:  # rows of the two halves of a tile came out in turn, see _decode
        y = y.reshape(*y.shape[:3], -1, 2).swapaxes(3, 4).reshape(y.shape)
    return restore_rows(y, layout)[:batch]


def _arrange(x: jax.Array, layout: Layout) -> tuple[jax.Array, int]:
    """Pads x and sorts its columns.

    Returns:
      (rows, blocks * D * 128): columns by block of vectors, then sub-dimension, then lane.
      rows of a batch tile.
    """
    dim = layout.grid.dim
    cols = layout.blocks * LANES * dim
    fitting = MAX_X_BYTES // (cols * x.dtype.itemsize) // SUBLANES * SUBLANES
    needed = -(-max(x.shape[0], 1) // SUBLANES) * SUBLANES
    tile = max(SUBLANES, min(_MAX_BATCH_TILE, fitting, needed))
    x = pad_axis(pad_axis(x, 1, cols), 0, -(-needed // tile) * tile)
    x = jnp.swapaxes(x.reshape(x.shape[0], layout.blocks, LANES, dim), 2, 3)
    return x.reshape(-1, cols), tile


def _kernel(
    first_ref,  # int32 (blocks,), scalars: of table_lanes
    lanes_ref,  # int32 (1, blocks * 128), of table_lanes
    codes_ref,  # int32 (1, 1, M, tile_rows * index_bits / 32, blocks * 128)
    bytes_ref,  # int8 (1, M * book_chunks, group_tile, 128)
    right_ref,  # float32 (rank, max(K, 128))
    x_ref,  # bfloat16 | float32 (batch_tile, blocks * D * 128)
    out_ref,  # float32 (1, 1, batch_tile, tile_rows)
    table_ref,  # the result of expand_tables
    numbers_ref,  # its scratch
    *,
    layout: Layout,
    width: int,
):
    @pl.when(pl.program_id(2) == 0)
    def _():
        expand_tables(bytes_ref, right_ref, numbers_ref, table_ref, layout)

    out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)
    cols = layout.grid.dim * LANES

    def blocks_step(start, count):
        total = 0.0
        for block in (start + i for i in range(count)):
            lanes = pl.ds(pl.multiple_of(block * LANES, LANES), LANES)

            def table(part, chunk, block=block):
                strips = table_ref[part, first_ref[block] + chunk]
                return jnp.concatenate([strips] * (layout.tile_rows // layout.table_rows))

            for book in range(layout.num_codebooks):
                index = read_codes(codes_ref[0, 0, book, :, lanes], layout) + lanes_ref[:, lanes]
                for d, weights in _decode(index, table, book, x_ref.dtype, layout, width):
                    x_lanes = pl.multiple_of(block * cols + d * LANES, LANES)
                    total += jax.lax.dot_general(
                        x_ref[:, pl.ds(x_lanes, LANES)],
                        weights,
                        (((1,), (1,)), ((), ())),
                        precision="highest" if weights.dtype == jnp.float32 else None,
                        preferred_element_type=jnp.float32,
                    )
        out_ref[0, 0] += total

    lookups = layout.tile_rows // SUBLANES * table_ref.shape[0] * width  # of a block
    grouped_loop(layout.blocks, max(1, _LOOKUPS // lookups), blocks_step)


def _decode(index: jax.Array, table, book: int, dtype, layout: Layout, width: int):
    """Yields d and the weights (tile_rows, 128) of sub-dimension d.

    Args:
      index: int32 (tile_rows, 128), lanes of the tables.
      table: (part, chunk) -> (tile_rows, 128) of the tables.

    In bfloat16 rows are t, t + tile_rows / 2 in turn: so two registers of 32-bit lanes become two
    of packed ones by ands, ors and shifts alone.
    """
    dim, half = layout.grid.dim, layout.tile_rows // 2
    parts = -(-dim // 2) if dtype == jnp.bfloat16 else dim
    for part in range(parts):
        values = lookup(partial(table, book * parts + part), index, width)
        if dtype == jnp.float32:
            yield part, values
            continue
        upper, lower = values[:half], values[half:]
        yield 2 * part, pltpu.bitcast((upper & 0xFFFF) | lower << 16, jnp.bfloat16)
        if 2 * part + 1 < dim:
            packed = jax.lax.shift_right_logical(upper, 16) | (lower & -(1 << 16))
            yield 2 * part + 1, pltpu.bitcast(packed, jnp.bfloat16)
