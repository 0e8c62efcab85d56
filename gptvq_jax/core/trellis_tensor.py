"""The trellis-coded weight: codes with memory, along output rows, and a rate for every column.

    W[r, j] = t_j * table[window of L bits of column j's stream at bit r * K_j] * s_r + outlier

Rows are cut into streams of T; a stream of column j has K_j bits for each of its rows and bites its
tail, so that the window of its last row goes on with its first bits (QTIP, arXiv 2406.11235). A
column of rate 0 is zero but for its outliers. s and t are float16; the table is that of
trellis_table.py or learned levels behind the same scrambling.

Stored are the columns in order of their rate, those of one rate in their own order: for each rate
from 1 up, for each cut of T rows, for each such column, ceil(T K / 8) bytes, least significant bit
first; one byte where there are none. Outliers, added at the end, stand in the order of columns and
then of rows; each one says how far behind the last one it is. A gap beyond 65535 is bridged by
outliers of 0.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.core import packing
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.core.trellis_table import TABLE_VERSION, gaussian_values, ranks

MAX_RATE = 6  # bits per weight of a column
LONGEST_GAP = 2**16 - 1
_VALUES_PER_OUTLIER = 128  # in a program; more outliers have one of their own
_static = partial(dataclasses.field, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrellisTensor(QuantizedTensor):
    """A quantized (R, C) weight, outputs x inputs, exactly as stored."""

    codes: jax.Array  # (bytes,) uint8
    rates: jax.Array  # (ceil(C / 2),) uint8: K_j of 4 bits each, packed
    row_scales: jax.Array  # (R,) float16
    col_scales: jax.Array  # (C,) float16
    levels: jax.Array | None  # (2^B,) float16, B at most L; None: quantiles of a Gaussian
    outlier_gaps: jax.Array | None  # (N,) uint16, the first one from position 0
    outlier_values: jax.Array | None  # (N,) float16; None if there are no outliers
    rows: int = _static()
    cols: int = _static()
    stream_rows: int = _static()  # T, at least L
    window_bits: int = _static()  # L
    table: int = _static(default=TABLE_VERSION)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def cuts(self) -> int:
        """Streams of a column; the last one may have rows of padding."""
        return -(-self.rows // self.stream_rows)

    def column_rates(self) -> jax.Array:
        """K_j (C,) int32."""
        return packing.unpack(self.rates, 4, self.cols)

    def windows(self) -> jax.Array:
        """What is looked up in the table: (R, C) int32, 0 in columns of rate 0."""
        rates = self.column_rates()
        codes = unpack_streams(self.codes, rates, self.cuts, self.stream_rows)
        window, count = codes, 1
        while count < self.window_bits:  # from `count` codes in a row to twice as many
            shift = jnp.minimum(count * rates, self.window_bits)  # what is beyond it is cut off
            window = window | (jnp.roll(window, -count, axis=1) << shift)
            window = window & (2**self.window_bits - 1)
            count *= 2
        return window.reshape(-1, self.cols)[: self.rows]

    def values(self) -> jax.Array:
        """(2^L,) float32: what each window stands for."""
        return table_values(self.window_bits, self.levels)

    def small_codes(self) -> jax.Array:
        """What `windows` gives, in the smallest unsigned integers that hold it."""
        return packing.in_fewest_bytes(self.windows(), self.window_bits)

    def dequantize(
        self,
        windows: jax.Array | None = None,
        outliers: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """The weight (R, C), float32.

        Args:
          windows, outliers: what the methods `windows` and `outlier_positions` give, where they
            are at hand: codes and gaps are not read then. An outlier beyond the last row counts
            for nothing.
        """
        if windows is None:
            windows = self.windows()
            outliers = None if self.outlier_gaps is None else self.outlier_positions()
        scales = jnp.where(self.column_rates() > 0, self.col_scales.astype(jnp.float32), 0.0)
        coded = self.values().at[windows].get(mode="promise_in_bounds")
        weight = coded * scales * jnp.asarray(self.row_scales, jnp.float32)[:, None]
        if outliers is None:
            return weight
        added = jnp.asarray(self.outlier_values, jnp.float32)
        return weight.at[outliers].add(added, mode="drop")

    def outlier_positions(self) -> tuple[jax.Array, jax.Array]:
        """Rows and columns (N,) int32 of the outliers."""
        place = jnp.cumsum(jnp.asarray(self.outlier_gaps, jnp.int32))
        return place % self.rows, place // self.rows

    def take_row_scales(self) -> tuple["TrellisTensor", None]:
        return self, None  # outliers are outside of them

    def for_compilation(self) -> "TrellisTensor":
        """With bytes that nothing reads and outliers of 0: nearly always one size for a shape.

        On the host, where a copy compiles nothing.
        """
        most = stream_bytes(MAX_RATE, self.stream_rows) * self.cuts * self.cols
        gaps, added = self.outlier_gaps, self.outlier_values
        count = 0 if gaps is None else len(gaps)
        least = max(count, self.num_values // _VALUES_PER_OUTLIER, 1)
        more = 2 ** (least - 1).bit_length() - count
        if gaps is None:
            gaps, added = np.zeros(0, np.uint16), np.zeros(0, np.float16)
        padded = lambda x, count: jnp.asarray(np.pad(np.asarray(x), (0, count)))  # noqa: E731
        return dataclasses.replace(
            self,
            codes=padded(self.codes, int(most) - len(self.codes)),
            outlier_gaps=padded(gaps, more),
            outlier_values=padded(added, more),
        )


def table_values(bits: int, levels: jax.Array | None) -> jax.Array:
    """(2^L,) float32: what each window of L = `bits` bits stands for, of levels (2^B,) or None."""
    if levels is None:
        return jnp.asarray(gaussian_values(bits))
    width = len(levels).bit_length() - 1
    return jnp.asarray(levels, jnp.float32)[ranks(bits) >> (bits - width)]


def stream_bytes(rates: jax.Array, stream_rows: int) -> jax.Array:
    """Bytes of a stream of T rows at each rate."""
    return (rates * stream_rows + 7) // 8


def stream_offsets(rates: jax.Array, cuts: int, stream_rows: int) -> jax.Array:
    """Where the streams of every column begin: (cuts, C) int32."""
    of_rate = rates[None] == jnp.arange(MAX_RATE + 1)[:, None]  # (rates, C)
    counts = jnp.sum(of_rate, axis=1)
    number = jnp.sum(jnp.where(of_rate, jnp.cumsum(of_rate, axis=1) - 1, 0), axis=0)
    sizes = stream_bytes(jnp.arange(MAX_RATE + 1), stream_rows)
    first = jnp.cumsum(counts * sizes * cuts) - counts * sizes * cuts
    in_cut = jnp.arange(cuts)[:, None] * counts[rates] + number
    return first[rates] + in_cut * sizes[rates]


def unpack_streams(stored: jax.Array, rates: jax.Array, cuts: int, stream_rows: int) -> jax.Array:
    """Codes (cuts, T, C) int32 of K_j bits each, 0 where K_j = 0; bytes at the end are not read.

    Args:
      stored: (bytes,) uint8.
      rates: K_j (C,) int32.
      cuts: streams of a column.
      stream_rows: T.
    """
    bit = jnp.arange(stream_rows)[:, None] * rates
    first = stream_offsets(rates, cuts, stream_rows)[:, None] + bit // 8
    stored = jnp.asarray(stored)
    low, high = (stored.at[first + i].get(mode="clip").astype(jnp.int32) for i in (0, 1))
    return ((low | high << 8) >> bit % 8) & ((1 << rates) - 1)


def pack_streams(codes: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """The stored bytes of codes; inverse of `unpack_streams`. On the host: their number varies.

    Args:
      codes: (cuts, T, C) integers of K_j bits.
      rates: K_j (C,).

    Returns:
      (bytes,) uint8.
    """
    parts = [np.zeros(0, np.uint8)]
    for rate in range(1, MAX_RATE + 1):
        of_rate = np.swapaxes(codes[:, :, rates == rate], 1, 2).astype(np.uint8)  # (cuts, n, T)
        planes = (of_rate[..., None] >> np.arange(rate, dtype=np.uint8)) & 1
        bits = planes.reshape(*of_rate.shape[:2], codes.shape[1] * rate)
        parts.append(np.packbits(bits, axis=-1, bitorder="little").reshape(-1))
    stored = np.concatenate(parts)
    return stored if len(stored) else np.zeros(1, np.uint8)


def _gaps(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each outlier is behind the last one, and how many of 0 bridge that."""
    gaps = np.diff(places, prepend=0)
    return gaps, np.maximum(gaps - 1, 0) // LONGEST_GAP


def count_outliers(places: np.ndarray) -> int:
    """How many `pack_outliers` stores for these."""
    return len(places) + int(_gaps(places)[1].sum())


def pack_outliers(places: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gaps (N,) uint16 and values (N,) float16 of outliers, with those of 0 that long gaps need.

    Args:
      places: row + R * column, ascending.
      values: of each.
    """
    gaps, bridges = _gaps(places)
    count = count_outliers(places)
    stored_gaps = np.full(count, LONGEST_GAP, np.uint16)
    stored = np.zeros(count, np.float16)
    last = np.arange(len(places)) + np.cumsum(bridges)
    stored_gaps[last] = gaps - bridges * LONGEST_GAP
    stored[last] = values
    return stored_gaps, stored
