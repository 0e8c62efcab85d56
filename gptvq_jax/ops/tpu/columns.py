"""A block of columns of a sweep or a recode on TPUs: one Pallas kernel (column_frame.py).

A program takes 1024 rows, a whole register of each column, through the block. Its columns, and the
centroids of the group of every row, lie in VMEM; U or H within the block and the D x D tables are
scalars in SMEM. So every step is arithmetic on whole registers: nothing is looked up along lanes.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gptvq_jax.ops.column_frame import Block, Sizes, Tile, recode_block, sweep_block
from gptvq_jax.ops.tpu.codes import pad_axis
from gptvq_jax.ops.tpu.layout import LANES, SUBLANES

_MAX_BYTES = 14 * 2**20  # of 16 MiB of VMEM where it is least
_MAX_COLS = 256  # U of a block takes 256 KiB of SMEM
_ROWS = SUBLANES * LANES


def check(cols: int, dim: int, size: int, shape: tuple[int, int]) -> None:
    """Raises NotImplementedError for what does not fit on the chip.

    Args:
      cols, dim, size: B, D and K.
      shape: (C, R), padded.
    """
    if cols > _MAX_COLS:
        raise NotImplementedError(
            f"U of {cols} columns does not fit in SMEM; set block_size to at most {_MAX_COLS}"
        )
    # Of columns: as given and as they become, errors, values; of vectors: codes twice, scales. What
    # is not kept from one program to the next is there twice.
    taken = 4 * _ROWS * (2 * size * dim + 7 * cols + 6 * cols // dim)
    if taken > _MAX_BYTES:
        raise NotImplementedError(
            f"{size} centroids for each of {_ROWS} rows take {taken / 2**20:.0f} MiB of VMEM with "
            f"their columns, more than {_MAX_BYTES >> 20}; set fewer bits or a smaller block_size"
        )


def sweep(
    block: Block, codes: jax.Array, loss: jax.Array, rows: int, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes with those of the block in their place, the loss with its own, and errors (B, G * r).

    Args:
      block: of a sweep.
      codes: (C / D, G * r) int32.
      loss: (G * r,) of the blocks before.
      rows: those that are none of padding, which comes behind them.
      interpret: as of pl.pallas_call.
    """
    kernel = partial(_sweep_kernel, inside=rows)
    found, change, loss = _call("sweep_block", kernel, block, [loss[None]], interpret)
    return _put(codes, found, block), loss[0], change


def recode(
    block: Block, codes: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Codes with new ones of the block in their place, and what they change of it (B, G * r).

    Args:
      block: of a recode.
      codes: (C / D, G * r) int32.
      interpret: as of pl.pallas_call.
    """
    old = lax.dynamic_slice_in_dim(codes, block.start // block.sizes.dim, block.sizes.vectors)
    found, change = _call("recode_block", _recode_kernel, block, [old], interpret)
    return _put(codes, found, block), change


def _put(codes: jax.Array, found: jax.Array, block: Block) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(codes, found, block.start // block.sizes.dim, axis=0)


def _call(name, kernel, block, states, interpret):
    """Codes of the block, its change, and where it is a sweep the loss; `states` come last."""
    sizes = block.sizes
    vectors, rows, first = sizes.vectors, sizes.rows, block.start // sizes.dim
    check(block.cols, sizes.dim, sizes.size, block.values.shape)

    def by_rows(array):
        """(n, R) -> (n, tiles, 8, 128)"""
        padded = pad_axis(array, 1, -(-rows // _ROWS) * _ROWS)
        return padded.reshape(len(array), -1, SUBLANES, LANES)

    matrix = lax.dynamic_slice(block.matrix, (block.start, block.start), (block.cols,) * 2)
    scalars = [lax.dynamic_slice_in_dim(table, first, vectors) for table in block.tables]
    scalars = [matrix, *(table.reshape(-1) for table in scalars)]
    book = lax.dynamic_index_in_dim(block.books, sizes.strip(first), keepdims=False)
    book = jnp.repeat(book.reshape(sizes.groups, -1).T, rows // sizes.groups, axis=1)
    tiled = [lax.dynamic_slice_in_dim(block.values, block.start, block.cols), book]
    if block.scale is not None:
        tiled.append(lax.dynamic_slice_in_dim(block.scale, sizes.scale_row(first), vectors))
    tiled = [by_rows(array) for array in (*tiled, *states)]
    tiles = tiled[0].shape[1]
    results = [(vectors, jnp.int32), (block.cols, jnp.float32)]
    if kernel is not _recode_kernel:
        results.append((1, jnp.float32))

    def tiles_of(count):
        return pl.BlockSpec((count, None, SUBLANES, LANES), lambda i: (0, i, 0, 0))

    found = pl.pallas_call(
        partial(kernel, sizes=sizes, tables=len(block.tables)),
        grid=(tiles,),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(scalars)
        + [tiles_of(len(array)) for array in tiled],
        out_specs=[tiles_of(count) for count, _ in results],
        out_shape=[
            jax.ShapeDtypeStruct((count, tiles, SUBLANES, LANES), dtype) for count, dtype in results
        ],
        scratch_shapes=[pltpu.VMEM((block.cols, SUBLANES, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name=name,
    )(*scalars, *tiled)
    return tuple(x.reshape(len(x), -1)[:, :rows] for x in found)


def _sweep_kernel(*refs, sizes: Sizes, tables: int, inside: int):
    *refs, codes_ref, change_ref, loss_ref, local_ref = refs
    tile, (given_ref,) = _tile(refs, (codes_ref, change_ref), local_ref, sizes, tables)
    row = pl.program_id(0) * _ROWS + lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0) * LANES
    row += lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    loss_ref[0] = sweep_block(tile, None, sizes, given_ref[0], row < inside)


def _recode_kernel(*refs, sizes: Sizes, tables: int):
    *refs, codes_ref, change_ref, local_ref = refs
    tile, (given_ref,) = _tile(refs, (codes_ref, change_ref), local_ref, sizes, tables)

    def old(j):
        """Its centroid is selected among all."""
        code = given_ref[j]

        def select(k, vector):
            return [
                jnp.where(code == k, a, b) for a, b in zip(tile.centroid(k), vector, strict=True)
            ]

        return code, lax.fori_loop(1, sizes.size, select, tile.centroid(0))

    recode_block(tile, None, sizes, old)


def _tile(refs, result_refs, local_ref, sizes: Sizes, tables: int):
    """The tile, its columns copied to where they change; and the references of states."""
    matrix_ref, *refs = refs
    table_refs, refs = refs[:tables], refs[tables:]
    values_ref, book_ref, *refs = refs
    scale_ref, refs = (refs[0], refs[1:]) if sizes.scales else (None, refs)
    dim = sizes.dim

    def taken(_, j):
        return [local_ref[j * dim + d] for d in range(dim)]

    def feed(_, j, change):
        """Of the columns behind the vector: nothing asks for those before it any more."""

        def of_vector(other, _):
            for column in [other * dim + d for d in range(dim)]:
                update = sum(matrix_ref[j * dim + d, column] * v for d, v in enumerate(change))
                local_ref[column] -= update

        lax.fori_loop(j + 1, sizes.vectors, of_vector, None)

    def table(n, j):
        at = j * dim * dim
        return [[table_refs[n][at + d * dim + e] for e in range(dim)] for d in range(dim)]

    def centroid(code):
        return [book_ref[code * dim + d] for d in range(dim)]

    def scale(j):
        return scale_ref[j]

    def write(n, j, result):
        for d, values in enumerate(result):
            result_refs[n][j * len(result) + d] = values

    local_ref[...] = values_ref[...]
    return Tile(taken, feed, scale if sizes.scales else None, table, centroid, write), refs
