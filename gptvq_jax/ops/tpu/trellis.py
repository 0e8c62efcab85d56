"""x W^T from trellis codes on TPUs: a Pallas kernel cuts windows, looks them up and multiplies.

Columns lie along lanes in the order of their rates, 128 of one rate in a block; a column that makes
a block begin is filled up with zeros. The 8 sublanes of a register are chunks of 32 rows
(trellis_words.py): the windows of row i of all of them are one shift of the same words, and another
of the next ones where they reach beyond. What follows a chunk's last word is the first word of the
sublane below. A program takes the chunks of whole streams, as many as fill registers best, and goes
through all columns. Scales of columns multiply x, those of rows and outliers come afterwards.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gptvq_jax.ops.tpu.codes import pad_axis
from gptvq_jax.ops.tpu.layout import LANES, MAX_X_BYTES, SUBLANES
from gptvq_jax.ops.tpu.tables import grouped_loop
from gptvq_jax.ops.tpu.trellis_layout import (
    PackedTrellis,
    TrellisLayout,
    check,
    pack,
    restore_rows,
)
from gptvq_jax.ops.trellis_words import ROWS, cut_windows

__all__ = ["PackedTrellis", "check", "matmul", "pack"]

_MAX_BATCH_TILE = 256  # rows of x for which a weight is decoded once
_CYCLES = 1024  # of a step of the loop over columns, about: lookups hide each other's latency


def matmul(x: jax.Array, packed: PackedTrellis, *, interpret=False) -> jax.Array:
    """x (N, C), weight of shape (R, C) -> (N, R) float32.

    Args:
      x: bfloat16 is multiplied by weights rounded to bfloat16, other types in float32.
      packed: of `pack`.
      interpret: as of pl.pallas_call.
    """
    layout, batch = packed.layout, x.shape[0]
    streams, narrow = layout.streams, x.dtype == jnp.bfloat16
    if not layout.blocks:
        return packed.outside.apply(jnp.zeros((batch, streams.rows), jnp.float32), x)
    dtype = jnp.bfloat16 if narrow else jnp.float32
    scaled = jnp.take(x, packed.columns, axis=1, mode="fill", fill_value=0).astype(jnp.float32)
    scaled = (scaled * packed.col_scales.astype(jnp.float32)).astype(dtype)
    tile = _batch_tile(batch, scaled)
    scaled = pad_axis(scaled, 0, -(-max(batch, 1) // tile) * tile)
    table = packed.narrow if narrow else packed.exact
    groups = layout.tile_chunks // SUBLANES
    y = pl.pallas_call(
        partial(_kernel, layout=layout),
        grid=(len(scaled) // tile, layout.tiles),
        in_specs=[
            pl.BlockSpec((1, *packed.words.shape[1:]), lambda n, a: (a, 0, 0)),
            pl.BlockSpec(table.shape, lambda n, a: (0, 0)),
            # One buffer is enough: x changes once in a pass over the weight.
            pl.BlockSpec(
                (tile, scaled.shape[1]), lambda n, a: (n, 0), pipeline_mode=pl.Buffered(1)
            ),
        ],
        out_specs=pl.BlockSpec((1, groups, tile, ROWS * SUBLANES), lambda n, a: (a, 0, n, 0)),
        out_shape=jax.ShapeDtypeStruct(
            (layout.tiles, groups, len(scaled), ROWS * SUBLANES), jnp.float32
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="trellis_matmul",
    )(packed.words, table, scaled)
    return packed.outside.apply(restore_rows(y, layout, narrow)[:batch], x)


def _batch_tile(batch: int, x: jax.Array) -> int:
    """Rows of x that are multiplied at once."""
    fitting = MAX_X_BYTES // (x.shape[1] * x.dtype.itemsize) // SUBLANES * SUBLANES
    needed = -(-max(batch, 1) // SUBLANES) * SUBLANES
    return max(SUBLANES, min(_MAX_BATCH_TILE, fitting, needed))


def _kernel(
    words_ref,  # int32 (1, rows, 128), of PackedTrellis
    table_ref,  # int32 (lookups, 128)
    x_ref,  # bfloat16 | float32 (batch_tile, blocks * 128)
    out_ref,  # float32 (1, groups, batch_tile, 256)
    *,
    layout: TrellisLayout,
):
    out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)
    narrow, chunks = x_ref.dtype == jnp.bfloat16, layout.tile_chunks
    cycles = chunks * ROWS // SUBLANES * layout.values.cycles(narrow)  # of the lookups of a block
    first_row = first_block = 0
    for rate, blocks in layout.runs:

        def blocks_step(start, count, rate=rate, first_row=first_row, first_block=first_block):
            totals = [0.0] * (chunks // SUBLANES)
            for block in (start + i for i in range(count)):
                row = pl.multiple_of(first_row + block * rate * chunks, SUBLANES)
                lanes = pl.ds(pl.multiple_of((first_block + block) * LANES, LANES), LANES)
                words = [words_ref[0, pl.ds(row + k * chunks, chunks), :] for k in range(rate)]
                words.append(_next_chunk(words[0], layout))
                for group in range(len(totals)):
                    here = [word[group * SUBLANES : (group + 1) * SUBLANES] for word in words]
                    windows = cut_windows(here, rate, layout.streams.window_bits)
                    windows = jnp.concatenate(list(windows))  # of (8, 128): row after row
                    weights = layout.values.read(windows, table_ref, narrow)
                    totals[group] += lax.dot_general(
                        x_ref[:, lanes],
                        weights,
                        (((1,), (1,)), ((), ())),
                        precision=None if narrow else "highest",
                        preferred_element_type=jnp.float32,
                    )
            for group, total in enumerate(totals):
                out_ref[0, group] += total

        grouped_loop(blocks, max(1, _CYCLES // cycles), blocks_step)
        first_row += blocks * rate * chunks
        first_block += blocks


def _next_chunk(first_words: jax.Array, layout: TrellisLayout) -> jax.Array:
    """What follows the last word of each chunk: the first of the next one of its stream."""
    chunks, rows = layout.streams.chunks, layout.tile_chunks
    below = pltpu.roll(first_words, rows - 1, 0) if rows > 1 else first_words
    if chunks == rows:
        return below
    chunk = lax.broadcasted_iota(jnp.int32, first_words.shape, 0)
    back = pltpu.roll(first_words, chunks - 1, 0) if chunks > 1 else first_words
    return jnp.where(lax.rem(chunk, chunks) == chunks - 1, back, below)
