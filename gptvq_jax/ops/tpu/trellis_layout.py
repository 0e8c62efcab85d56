"""Trellis codes as their TPU kernel reads them: which streams share a program, and their words."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.ops.tpu.layout import LANES, SUBLANES
from gptvq_jax.ops.tpu.trellis_values import Values
from gptvq_jax.ops.trellis_words import ROWS, Outside, Streams, check_known, outside, stream_words

_MAX_BITS = 12  # of a window: 2^12 float32 are 32 lookups
_MAX_TILE_BYTES = 3 * 2**20  # of words in VMEM, twice; see layout.py for the rest
_MAX_TILE_CHUNKS = 32  # 1024 rows: results of 256 rows of x take 1 MiB, twice
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
    if tensor.window_bits > _MAX_BITS:
        lookups = 2**tensor.window_bits // LANES
        raise NotImplementedError(
            f"windows of {tensor.window_bits} bits would take {lookups} lookups of {LANES} lanes; "
            f"it reads at most {_MAX_BITS}"
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


def restore_rows(y: jax.Array, layout: TrellisLayout, narrow: bool) -> jax.Array:
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
