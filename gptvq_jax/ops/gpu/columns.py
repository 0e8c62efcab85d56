"""A block of columns of a sweep or a recode on NVIDIA GPUs: one Pallas kernel (column_frame.py).

A program holds its rows of the block in registers, as columns x rows. The columns of a vector are
taken out of them by a masked sum, exact because all else in it is 0, and the outer product of a
change and a row of the matrix is subtracted from them: no thread waits for what another one writes
to memory. Centroids of a row's group, U or H, and scales are loaded where they are needed: threads
of a warp ask for the same few, and they stay in the first cache.

Arrays are whole: what XLA cut out of them it would copy, by one kernel more each time. They are
flat, and their indices int32.

Triton, and not Mosaic GPU, for the reasons in pallas_gpu.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from gptvq_jax.ops.column_frame import Block, Sizes, Tile, recode_block, sweep_block

_ROWS = 64  # of a program: as many of them as an H100 has multiprocessors, where R is 8192
_WARPS = 4
_MAX_COLS = 256  # 128 numbers in each thread


def check(cols: int, dim: int, size: int, shape: tuple[int, int]) -> None:
    """Raises NotImplementedError for what does not fit in registers, or needs longer indices.

    Args:
      cols, dim, size: B, D and K.
      shape: (C, R), padded.
    """
    if cols > _MAX_COLS:
        raise NotImplementedError(
            f"{cols} columns do not fit in the registers of a program; set block_size to at most "
            f"{_MAX_COLS}"
        )
    if shape[0] * max(shape) >= 2**31 or shape[1] * size * dim >= 2**31:
        raise NotImplementedError(f"a layer of {shape[::-1]} needs 64-bit indices")


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
    kernel = partial(_sweep, inside=rows)
    return _call("sweep_block", kernel, block, (codes, loss), interpret)


def recode(
    block: Block, codes: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Codes with new ones of the block in their place, and what they change of it (B, G * r).

    Args:
      block: of a recode.
      codes: (C / D, G * r) int32.
      interpret: as of pl.pallas_call.
    """
    return _call("recode_block", _recode, block, (codes,), interpret)


def _call(name, code, block, states, interpret):
    """`states` become results, in place; the change of the block follows them."""
    sizes = block.sizes
    check(block.cols, sizes.dim, sizes.size, block.values.shape)
    given = [block.start, block.values, block.matrix, block.books, *block.tables]
    given += [] if block.scale is None else [block.scale]
    flat = [x.reshape(-1) for x in (*given, *states)]
    change = jax.ShapeDtypeStruct((block.cols * sizes.rows,), jnp.float32)
    *found, change = pl.pallas_call(
        partial(_kernel, code=code, sizes=sizes, tables=len(block.tables), states=len(states)),
        grid=(-(-sizes.rows // _ROWS),),
        out_shape=[*(jax.ShapeDtypeStruct((x.size,), x.dtype) for x in states), change],
        input_output_aliases={len(given) + i: i for i in range(len(states))},
        compiler_params=pltriton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name=name,
    )(*flat)
    found = [x.reshape(state.shape) for x, state in zip(found, states, strict=True)]
    return *found, change.reshape(block.cols, -1)


def _kernel(*refs, code, sizes: Sizes, tables: int, states: int):
    start_ref, values_ref, matrix_ref, book_ref, *refs = refs
    table_refs, refs = refs[:tables], refs[tables:]
    scale_ref, refs = (refs[0], refs[1:]) if sizes.scales else (None, refs)
    given, (*results, change_ref) = refs[:states], refs[states:]
    dim, rows, cols = sizes.dim, sizes.rows, sizes.vectors * sizes.dim
    start = start_ref[0]
    first = lax.div(start, jnp.int32(dim))
    row = pl.program_id(0) * _ROWS + jnp.arange(_ROWS, dtype=jnp.int32)
    exists = row < rows
    column = jnp.arange(pl.next_power_of_2(cols), dtype=jnp.int32)
    group = lax.div(jnp.minimum(row, rows - 1), jnp.int32(rows // sizes.groups))
    group += sizes.strip(first) * sizes.groups

    def load(ref, line):
        return pltriton.load(ref.at[line * rows + row], mask=exists, other=0)

    def taken(local, j):
        here = [column[:, None] == j * dim + d for d in range(dim)]
        return [jnp.sum(jnp.where(mask, local, 0.0), axis=0) for mask in here]

    def feed(local, j, change):
        update = 0.0
        for d, of_column in enumerate(change):
            at = (start + j * dim + d) * sizes.all_cols + start + column
            line = pltriton.load(matrix_ref.at[at], mask=column < cols, other=0)
            update += line[:, None] * of_column[None, :]
        return local - update

    def table(n, j):
        at = (first + j) * dim * dim
        return [[table_refs[n][at + d * dim + e] for e in range(dim)] for d in range(dim)]

    def centroid(k):
        return [book_ref[(group * sizes.size + k) * dim + d] for d in range(dim)]

    def scale(j):
        return load(scale_ref, sizes.scale_row(first) + j)

    def write(n, j, result):
        ref, line = (results[0], first + j) if n == 0 else (change_ref, j * dim)
        for d, values in enumerate(result):
            pltriton.store(ref.at[(line + d) * rows + row], values, mask=exists)

    at = (start + column[:, None]) * rows + row[None, :]
    there = (column[:, None] < cols) & exists[None, :]
    local = pltriton.load(values_ref.at[at], mask=there, other=0)
    tile = Tile(taken, feed, scale if sizes.scales else None, table, centroid, write)

    def state(n, line):
        return load(given[n], line)

    def keep(n, values):
        pltriton.store(results[n].at[row], values, mask=exists)

    code(tile, local, sizes, first, row, state, keep)


def _sweep(tile, local, sizes, first, row, state, keep, inside):
    keep(1, sweep_block(tile, local, sizes, state(1, 0), row < inside))


def _recode(tile, local, sizes, first, row, state, keep):
    def old(j):
        code = state(0, first + j)
        return code, tile.centroid(code)

    recode_block(tile, local, sizes, old)
