"""x W^T from trellis codes on TPUs: a Pallas kernel cuts windows, looks them up and multiplies.

Columns lie along lanes in the order of their rates, 128 of one rate in a block; a column that makes
a block begin is filled up with zeros. The 8 sublanes of a register are chunks of 32 rows
(trellis_words.py): the windows of row i of all of them are one shift of the same words, and another
of the next ones where they reach beyond. What follows a chunk's last word is the first word of the
sublane below. A program takes the chunks of whole streams, as many as fill registers best, and goes
through all columns. Scales of columns multiply x, those of rows and outliers come afterwards.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.ops.tpu.codes import pad_axis
from gptvq_jax.ops.tpu.layout import LANES, MAX_X_BYTES, SUBLANES
from gptvq_jax.ops.tpu.tables import grouped_loop
from gptvq_jax.ops.tpu.trellis_values import Values
from gptvq_jax.ops.trellis_words import (
    ROWS,
    Outside,
    Streams,
    check_known,
    cut_windows,
    outside,
    stream_words,
)

MAX_BITS = 12  # of a window: 2^12 float32 are 32 lookups
_MAX_BATCH_TILE = 256  # rows of x for which a weight is decoded once
_MAX_TILE_BYTES = 3 * 2**20  # of words in VMEM, twice; see layout.py for the rest
_MAX_TILE_CHUNKS = 64
_CYCLES = 1024  # of a step of the loop over columns, about: lookups hide each other's latency
_static = partial(dataclasses.field, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class TrellisLayout:
    """Everything static about a packed tensor."""

    streams: Streams
    values: Values
    runs: tuple[tuple[int, int], ...]  # (rate, blocks of 128 columns), by rate
    tile_streams: int  # of a column in a program

    @property
    def blocks(self) -> int:
        return sum(blocks for _, blocks in self.runs)

    @property
    def block_words(self) -> int:
        """Words of a lane in all blocks, for each chunk."""
        return sum(rate * blocks for rate, blocks in self.runs)

    @property
    def tiles(self) -> int:
        return -(-self.streams.cuts // self.tile_streams)

    @property
    def tile_chunks(self) -> int:
        """Filled up to whole registers."""
        return -(-self.tile_streams * self.streams.chunks // SUBLANES) * SUBLANES

    @property
    def tile_bytes(self) -> int:
        """Of words, in VMEM."""
        return 4 * LANES * self.tile_chunks * self.block_words


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTrellis:
    """A trellis-coded weight in the layout of the kernel."""

    # (tiles, rows, 128) int32; rows are the words of each run, block, word of a chunk, and chunk
    words: jax.Array
    exact: jax.Array  # int32 (lookups, 128): tables for weights in float32, of Values.tables
    narrow: jax.Array  # for those in bfloat16
    columns: jax.Array  # (blocks * 128,) int32: what lanes are; C where they are padding
    col_scales: jax.Array  # (blocks * 128,) float16
    outside: Outside
    layout: TrellisLayout = _static()


def check(tensor: TrellisTensor) -> None:
    """Raises NotImplementedError for a tensor that the kernel cannot read, with the reason."""
    if tensor.window_bits > MAX_BITS:
        lookups = 2**tensor.window_bits // LANES
        raise NotImplementedError(
            f"windows of {tensor.window_bits} bits would take {lookups} lookups of {LANES} lanes; "
            f"it reads at most {MAX_BITS}"
        )
    check_known(tensor)
    rates = np.asarray(tensor.column_rates())
    layout = _layout(tensor, {int(k): int(np.sum(rates == k)) for k in np.unique(rates) if k})
    if layout.tile_bytes > _MAX_TILE_BYTES:
        raise NotImplementedError(
            f"the streams of {tensor.stream_rows} rows take {layout.tile_bytes / 2**20:.1f} MiB of "
            f"VMEM and {_MAX_TILE_BYTES / 2**20:.0f} are set aside"
        )


def pack(tensor: TrellisTensor) -> PackedTrellis:
    """Lays the streams out in words, once, on the host; as packed as they were, but for padding."""
    words = stream_words(tensor)
    layout = _layout(tensor, {rate: len(columns) for rate, (columns, _) in words.items()})
    columns, arranged = [np.zeros(0, np.int32)], []
    for (_, blocks), (index, of_rate) in zip(layout.runs, words.values(), strict=True):
        columns.append(np.pad(index, (0, blocks * LANES - len(index)), constant_values=tensor.cols))
        arranged.append(_arrange_words(of_rate, blocks, layout))
    columns = np.concatenate(columns).astype(np.int32)
    shape = layout.tiles, 0, LANES
    arranged = np.concatenate([np.zeros(shape, np.int32), *arranged], axis=1)
    scales = np.pad(np.asarray(tensor.col_scales), (0, 1))[columns]  # 0 for padding
    arrays = arranged, *layout.values.tables(tensor), columns, scales
    return PackedTrellis(*map(jnp.asarray, arrays), outside(tensor), layout)


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
    return packed.outside.apply(_restore_rows(y, layout, narrow)[:batch], x)


def _layout(tensor: TrellisTensor, columns: dict[int, int]) -> TrellisLayout:
    """Of so many columns of each rate: the fewest chunks of padding, then the smallest programs."""
    runs = tuple((rate, -(-count // LANES)) for rate, count in sorted(columns.items()))
    streams = Streams.of(tensor)
    fixed = streams, Values.of(tensor), runs
    most = max(1, min(streams.cuts, _MAX_TILE_CHUNKS // streams.chunks))
    candidates = [TrellisLayout(*fixed, count) for count in range(1, most + 1)]
    fitting = [layout for layout in candidates if layout.tile_bytes <= _MAX_TILE_BYTES]

    def cost(layout: TrellisLayout):
        return layout.tiles * layout.tile_chunks, layout.tile_chunks

    return min(fitting or candidates[:1], key=cost)


def _arrange_words(words: np.ndarray, blocks: int, layout: TrellisLayout) -> np.ndarray:
    """(cuts, chunks, K, n) uint32 -> (tiles, blocks * K * tile_chunks, 128) int32."""
    cuts, chunks, rate, count = words.shape
    more = layout.tiles * layout.tile_streams - cuts
    words = np.pad(words, ((0, more), (0, 0), (0, 0), (0, blocks * LANES - count)))
    words = words.reshape(layout.tiles, layout.tile_streams * chunks, rate, blocks, LANES)
    words = words.transpose(0, 3, 2, 1, 4)
    words = np.pad(words, [(0, 0)] * 3 + [(0, layout.tile_chunks - words.shape[3]), (0, 0)])
    return words.reshape(layout.tiles, -1, LANES).view(np.int32)


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


def _restore_rows(y: jax.Array, layout: TrellisLayout, narrow: bool) -> jax.Array:
    """Outputs of programs (tiles, groups, N, 256) -> (N, R)."""
    streams, batch = layout.streams, y.shape[2]
    if narrow:  # rows of the two halves came out in turn
        y = y.reshape(*y.shape[:3], ROWS // 2, SUBLANES, 2).transpose(2, 0, 1, 4, 5, 3)
    else:
        y = y.reshape(*y.shape[:3], ROWS, SUBLANES).transpose(2, 0, 1, 4, 3)
    y = y.reshape(batch, layout.tiles, layout.tile_chunks * ROWS)
    y = y[:, :, : layout.tile_streams * streams.chunks * ROWS]
    y = y.reshape(batch, layout.tiles * layout.tile_streams, streams.chunks * ROWS)
    return streams.restore_rows(y[:, : streams.cuts])
