"""x W^T from trellis codes on NVIDIA GPUs: a Pallas kernel for few rows of x.

Lanes lie along columns of one rate, which are sorted by it; a lane takes a chunk of 32 rows
(trellis_words.py): K words, and the first of the next chunk. Their windows are cut by shifts that
are the same in every lane, and looked up by loads from a table that stays in L1. As elsewhere
(pallas_gpu.py), values are multiplied and added in float32 for one or two rows of x, or in float32;
more go through tensor cores, and many are multiplied by a weight that is decoded once.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.ops.trellis_words import (
    ROWS,
    Outside,
    Streams,
    check_known,
    cut_windows,
    outside,
    stream_words,
)

MAX_BATCH = 64  # rows of x that the kernel takes
_COLS = 32  # of a step: a warp's lanes
_DOT_CHUNKS = 16  # of a tile for tensor cores: the rows of a matrix product
_SUM_CHUNKS = 4
_DOT_BATCH = 16
_PRODUCTS_BATCH = 2  # rows of x that a program multiplies without tensor cores
_WARPS = 4
_static = partial(dataclasses.field, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class TrellisLayout:
    """Everything static about a packed tensor."""

    streams: Streams
    runs: tuple[tuple[int, int], ...]  # (rate, columns filled up to whole steps), by rate

    @property
    def chunks(self) -> int:
        """Of a column."""
        return self.streams.cuts * self.streams.chunks

    @property
    def cols(self) -> int:
        return sum(cols for _, cols in self.runs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTrellis:
    """A trellis-coded weight in the layout of the kernel."""

    words: jax.Array  # uint32: of each run (chunks, K, columns), one after the other
    table: jax.Array  # (2^L,) float16
    columns: jax.Array  # int32 (cols of the layout,): what they are; C where they are padding
    col_scales: jax.Array  # float16, likewise
    outside: Outside
    layout: TrellisLayout = _static()


def check(tensor: TrellisTensor) -> None:
    """Supports every tensor whose words 32-bit indices reach."""
    check_known(tensor)
    if len(tensor.codes) > 2**32:
        raise NotImplementedError(f"{len(tensor.codes)} bytes of codes need 64-bit indices")


def pack(tensor: TrellisTensor) -> PackedTrellis:
    """Lays the streams out in words, once, on the host; as packed as they were, but for padding."""
    words, columns, runs = [np.zeros(0, np.uint32)], [np.zeros(0, np.int32)], []
    for rate, (index, of_rate) in stream_words(tensor).items():
        more = -len(index) % _COLS
        columns.append(np.pad(index, (0, more), constant_values=tensor.cols))
        words.append(np.pad(of_rate, ((0, 0),) * 3 + ((0, more),)).reshape(-1))
        runs.append((rate, len(index) + more))
    columns = np.concatenate(columns).astype(np.int32)
    scales = np.pad(np.asarray(tensor.col_scales), (0, 1))[columns]  # 0 for padding
    table = np.asarray(tensor.values()).astype(np.float16)  # what is stored, exactly
    arrays = map(jnp.asarray, (np.concatenate(words), table, columns, scales))
    return PackedTrellis(*arrays, outside(tensor), TrellisLayout(Streams.of(tensor), tuple(runs)))


def matmul(x: jax.Array, packed: PackedTrellis, *, interpret: bool = False) -> jax.Array:
    """x (N, C), weight of shape (R, C) -> (N, R) float32.

    Args:
      x: floating point; float32 is multiplied as float32, not in fewer bits.
      packed: from `pack`.
      interpret: runs the kernel as jnp operations, on any platform.
    """
    layout, batch = packed.layout, x.shape[0]
    if not layout.runs or not batch:
        return packed.outside.apply(jnp.zeros((batch, layout.streams.rows), jnp.float32), x)
    scaled = jnp.take(x, packed.columns, axis=1, mode="fill", fill_value=0).astype(jnp.float32)
    scaled = scaled * packed.col_scales.astype(jnp.float32)
    if batch > MAX_BATCH:
        y = _decoded_product(scaled.astype(x.dtype), packed)
    else:
        y = run_kernel(scaled, packed, choose_tile(layout, batch, x.dtype), x.dtype, interpret)
    y = y.reshape(len(y), layout.streams.cuts, layout.streams.chunks * ROWS)
    return packed.outside.apply(layout.streams.restore_rows(y), x)


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one program computes."""

    chunks: int  # of 32 rows of the weight, a power of two
    splits: int  # programs that share the columns
    batch: int  # rows of x
    tensor_cores: bool


def choose_tile(layout: TrellisLayout, batch: int, dtype: jnp.dtype) -> Tile:
    """From counts of registers and programs; not tuned on hardware."""
    tensor_cores = batch > _PRODUCTS_BATCH and jnp.dtype(dtype).itemsize == 2
    if tensor_cores:
        chunks, block, wanted = _DOT_CHUNKS, _DOT_BATCH, 512
    else:
        chunks, block, wanted = _SUM_CHUNKS, min(batch, _PRODUCTS_BATCH), 1024  # 8 for each SM
    programs = -(-layout.chunks // chunks) * -(-batch // block)
    steps = max(cols for _, cols in layout.runs) // _COLS
    return Tile(chunks, max(1, min(wanted // programs, steps)), block, tensor_cores)


def run_kernel(x, packed: PackedTrellis, tile: Tile, dtype, interpret: bool) -> jax.Array:
    """Sums (N, chunks * 32) of x (N, cols of the layout) float32; `dtype` is for tensor cores."""
    layout, batch = packed.layout, x.shape[0]
    x = jnp.pad(x, ((0, -batch % tile.batch), (0, 0)))
    tiles, blocks = -(-layout.chunks // tile.chunks), len(x) // tile.batch
    shape = tile.splits, len(x), ROWS, tiles * tile.chunks
    sums = pl.pallas_call(
        partial(_kernel, layout=layout, tile=tile),
        grid=(tiles, tile.splits, blocks),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        compiler_params=pltriton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="trellis_matmul",
    )(packed.words, packed.table, x.T.astype(dtype) if tile.tensor_cores else x)
    y = jnp.sum(sums, axis=0)[:batch, :, : layout.chunks]
    return jnp.swapaxes(y, 1, 2).reshape(batch, -1)


def _kernel(words_ref, table_ref, x_ref, out_ref, *, layout: TrellisLayout, tile: Tile):
    """One program.

    Args:
      words_ref, table_ref: of PackedTrellis.
      x_ref: (N, cols) float32, or (cols, N) for tensor cores.
      out_ref: (splits, N, 32, chunks), padded.
    """
    first, split = pl.program_id(0) * tile.chunks, pl.program_id(1)
    batch = pl.program_id(2) * tile.batch
    chunk = jnp.minimum(first + jnp.arange(tile.chunks, dtype=jnp.int32), layout.chunks - 1)
    of_stream = lax.rem(chunk, jnp.int32(layout.streams.chunks))
    after = chunk + jnp.where(of_stream == layout.streams.chunks - 1, -of_stream, 1)
    add = _add_dots if tile.tensor_cores else _add_products
    kept = (tile.chunks, tile.batch if tile.tensor_cores else _COLS)
    count = ROWS * (1 if tile.tensor_cores else tile.batch)
    sums = (jnp.zeros(kept, jnp.float32),) * count
    first_word = first_col = 0
    for rate, cols in layout.runs:
        steps = cols // _COLS

        def step(i, sums, rate=rate, cols=cols, first_word=first_word, first_col=first_col):
            col = i * _COLS + jnp.arange(_COLS, dtype=jnp.int32)[None, :]
            row = first_word + chunk[:, None] * (rate * cols) + col
            words = [words_ref[row + k * cols] for k in range(rate)]
            words.append(words_ref[first_word + after[:, None] * (rate * cols) + col])
            values = _values(words, table_ref, rate, layout.streams.window_bits)
            return add(sums, values, x_ref, batch, pl.ds(first_col + i * _COLS, _COLS), tile)

        # Programs that share the columns take steps in turn.
        mine = lax.div(steps - split + tile.splits - 1, jnp.int32(tile.splits))
        turn = partial(_nth_turn, step, split, tile.splits)
        sums = lax.fori_loop(jnp.int32(0), mine, turn, sums)
        first_word += layout.chunks * rate * cols
        first_col += cols
    at = pl.ds(first, tile.chunks)
    for i in range(ROWS):
        if tile.tensor_cores:
            out_ref[split, pl.ds(batch, tile.batch), i, at] = sums[i].T
            continue
        for n in range(tile.batch):
            out_ref[split, batch + n, i, at] = jnp.sum(sums[i * tile.batch + n], axis=1)


def _nth_turn(step, split, splits: int, i, sums):
    return step(split + i * splits, sums)


def _values(words: list[jax.Array], table_ref, rate: int, bits: int):
    """Yields what the windows of row after row stand for, (chunks, columns) float32."""
    for window in cut_windows(words, rate, bits):
        yield table_ref[window.astype(jnp.int32)].astype(jnp.float32)


def _add_products(sums, values, x_ref, batch, cols, tile: Tile):
    """Multiplies and adds in float32, one sum of (chunks, columns) for each row and row of x."""
    factors = [x_ref[batch + n, cols] for n in range(tile.batch)]
    added = []
    for i, value in enumerate(values):
        for n, factor in enumerate(factors):
            added.append(sums[i * tile.batch + n] + value * factor[None, :])
    return tuple(added)


def _add_dots(sums, values, x_ref, batch, cols, tile: Tile):
    """Multiplies values, rounded to the dtype of x, on tensor cores: sums of (chunks, N)."""
    factor = x_ref[cols, pl.ds(batch, tile.batch)]
    return tuple(
        total + jnp.dot(value.astype(x_ref.dtype), factor, preferred_element_type=jnp.float32)
        for total, value in zip(sums, values, strict=True)
    )


def _decoded_product(x: jax.Array, packed: PackedTrellis) -> jax.Array:
    """`run_kernel` by a weight that is decoded once, in the dtype of x."""
    layout, decoded = packed.layout, []
    first = 0
    for rate, cols in layout.runs:
        size = layout.chunks * rate * cols
        words = packed.words[first : first + size].reshape(
            layout.streams.cuts, layout.streams.chunks, rate, cols
        )
        first += size
        words = [*jnp.moveaxis(words, 2, 0), jnp.roll(words[:, :, 0], -1, axis=1)]
        values = _values(words, packed.table, rate, layout.streams.window_bits)
        rows = jnp.stack([value.astype(x.dtype) for value in values], axis=2)
        decoded.append(rows.reshape(layout.chunks * ROWS, cols))
    weight = jnp.concatenate(decoded, axis=1)
    precision = "highest" if x.dtype == jnp.float32 else None
    return jnp.matmul(x, weight.T, precision=precision, preferred_element_type=jnp.float32)
