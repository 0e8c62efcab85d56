"""What windows of a trellis code stand for, by as few lookups of 128 lanes as there are ways.

A lookup along lanes takes some 4 cycles, as 16 other operations do, further ones by the same lanes
2 to 3; a table of 2^L float32 takes 2^L / 128 of them, of bfloat16, two in a lane, half of that. So
there are three ways:

  direct  in the table by window
  ranked  the rank of a window, by two lookups (`trellis_table.rank_parts`), then learned levels
  curve   the rank, then the quantile of the Gaussian, by one lookup: lines between 8 knots to each
          octave of the distance from the nearer end. They miss it by 2e-4 (root mean square, of a
          deviation of 1), an eighth of what bfloat16 rounds it by; float32 goes another way
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from gptvq_jax.core.trellis_table import gaussian_levels, rank_parts
from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.ops.tpu.layout import LANES
from gptvq_jax.ops.tpu.tables import lookup

DIRECT, RANKED, CURVE = "direct", "ranked", "curve"
_KNOT_BITS = 3  # of a float32's mantissa: 8 knots to an octave
_SLOPE_BITS = 8  # the lowest of a knot's value hold the slope behind it
_SLOPE_STEP = 2.0**-11
_REST = 23 - _KNOT_BITS  # bits of the mantissa that say how far behind a knot


@dataclasses.dataclass(frozen=True)
class Values:
    """How windows are read: everything but tables."""

    bits: int  # L
    level_bits: int | None  # B of learned levels, 1 for a single one; None: the Gaussian

    @classmethod
    def of(cls, tensor: TrellisTensor) -> "Values":
        levels = tensor.levels
        width = None if levels is None else max(1, len(levels).bit_length() - 1)
        return cls(tensor.window_bits, width)

    def way(self, narrow: bool) -> str:
        """The cheapest one; `narrow` for weights in bfloat16."""
        return min(self._ways(narrow), key=lambda way: self.cycles(narrow, way))

    def cycles(self, narrow: bool, way: str | None = None) -> int:
        """Of the lookups of one register of weights, about: 2 to say which lanes, 2 for each."""
        return sum(2 + 2 * width for width in self._ways(narrow)[way or self.way(narrow)])

    def _ways(self, narrow: bool) -> dict[str, tuple[int, ...]]:
        """The lookups by each set of lanes, one set after the other."""
        rank = self._rank_widths
        ways = {DIRECT: (_width(self.bits, narrow),)}
        if self.level_bits is not None:
            ways[RANKED] = *rank, _width(self.level_bits, narrow)
        elif narrow:
            ways[CURVE] = *rank, 1
        return ways

    @property
    def _rank_widths(self) -> tuple[int, ...]:
        return tuple(max(1, len(part) // LANES) for part in rank_parts(self.bits)[:2])

    def tables(self, tensor: TrellisTensor) -> tuple[np.ndarray, np.ndarray]:
        """int32 (lookups, 128) for weights in float32, and for those in bfloat16."""
        return self._tables(tensor, narrow=False), self._tables(tensor, narrow=True)

    def _tables(self, tensor: TrellisTensor, narrow: bool) -> np.ndarray:
        way = self.way(narrow)
        if way == DIRECT:
            return _lanes(np.asarray(tensor.values()), narrow)
        low, high, _ = rank_parts(self.bits)
        # Ranks lie in the highest bits: what shifts out of a window there needs no mask.
        parts = [_repeat(part << (32 - self.bits)) for part in (low, high)]
        if way == RANKED:
            levels = np.asarray(tensor.levels, np.float32)
            parts.append(_lanes(np.resize(levels, 2**self.level_bits), narrow))
        else:
            parts.append(_repeat(curve(self.bits)))
        return np.concatenate(parts)

    def read(self, windows: jax.Array, table_ref, narrow: bool) -> jax.Array:
        """Weights (rows, 128) of windows (rows, 128) int32, which have L bits.

        In bfloat16 rows t and t + rows / 2 of the windows are rows 2 t and 2 t + 1 of the weights:
        halves of the same lanes.
        """
        read = {DIRECT: self._direct, RANKED: self._ranked, CURVE: self._curve}
        table = partial(_under_rows, table_ref, len(windows))
        return read[self.way(narrow)](windows, table, narrow)

    def _direct(self, windows, table, narrow):
        return _choose(windows, table, 0, self.bits, narrow)

    def _ranked(self, windows, table, narrow):
        rank = jax.lax.shift_right_logical(self._rank(windows, table), 32 - self.level_bits)
        return _choose(rank, table, sum(self._rank_widths), self.level_bits, narrow)

    def _curve(self, windows, table, narrow):
        assert narrow
        rank = self._rank(windows, table)
        end = (rank ^ rank >> 31) & 0x7FFFFFFF  # from the nearer end of the ranks
        end = jax.lax.shift_right_logical(end, 31 - self.bits) | 1  # 2 t + 1: the middle of step t
        place = jax.lax.bitcast_convert_type(end.astype(jnp.float32), jnp.int32)
        knot = lookup(partial(table, sum(self._rank_widths)), (place >> _REST) & (LANES - 1), 1)
        slope = (knot & (2**_SLOPE_BITS - 1)).astype(jnp.float32)
        behind = (place & (2**_REST - 1)).astype(jnp.float32) * (_SLOPE_STEP * 2.0**-_REST)
        value = jax.lax.bitcast_convert_type(knot, jnp.float32) - slope * behind
        sign = ~rank & -(2**31)  # the lower half of the ranks is below 0
        return _bfloat16(jax.lax.bitcast_convert_type(value, jnp.int32) | sign)

    def _rank(self, windows, table):
        """Ranks in the highest bits of int32."""
        low, _, split = rank_parts(self.bits)
        width, _ = self._rank_widths
        from_low = lookup(partial(table, 0), (windows >> 1) & (len(low) - 1), width)
        from_high = lookup(partial(table, width), windows >> split, 1)
        return from_low ^ from_high ^ windows << 31


def curve(bits: int) -> np.ndarray:
    """The knots int32 (128,) of quantiles of 2^L: a value in float32, and in it the slope.

    A quantile lies at the float32 number 2 t + 1, t steps from the nearer end: the highest bits of
    its mantissa and the lowest of its exponent are the number of its knot, the rest says how far
    behind that it lies.
    """
    half = 2 ** (bits - 1)
    sizes = -gaussian_levels(2**bits)[:half].astype(np.float64)  # falling towards the middle
    place = (2 * np.arange(half) + 1).astype(np.float32).view(np.int32)
    number = place >> _REST
    behind = (place & (2**_REST - 1)) * 2.0**-_REST
    knots = np.zeros(LANES, np.int32)
    for i in np.unique(number):
        x, y = behind[number == i], sizes[number == i]
        slope = -np.polyfit(x, y, 1)[0] if len(x) > 1 else 0.0
        steps = int(np.clip(round(slope / _SLOPE_STEP), 0, 2**_SLOPE_BITS - 1))
        level = y + steps * _SLOPE_STEP * x
        value = np.float32((level.min() + level.max()) / 2).view(np.int32)
        knots[i % LANES] = value & -(2**_SLOPE_BITS) | steps
    return knots


def _width(bits: int, narrow: bool) -> int:
    """Lookups in a table of so many bits."""
    return max(1, 2 ** (bits - narrow) // LANES)


def _under_rows(table_ref, rows: int, first: int, chunk: int) -> jax.Array:
    """The lanes of one lookup, under every row."""
    return jnp.broadcast_to(table_ref[first + chunk : first + chunk + 1, :], (rows, LANES))


def _choose(index, table, first: int, bits: int, narrow: bool) -> jax.Array:
    """Values by their index, of tables made by `_lanes`."""
    width, chunk = _width(bits, narrow), partial(table, first)
    if not narrow:
        return jax.lax.bitcast_convert_type(lookup(chunk, index, width), jnp.float32)
    found, odd = lookup(chunk, index >> 1, width), (index & 1) << 4
    half = len(index) // 2
    upper = jax.lax.shift_right_logical(found[:half], odd[:half]) & 0xFFFF
    lower = found[half:] << (16 - odd[half:])
    return pltpu.bitcast(upper | (lower & -(1 << 16)), jnp.bfloat16)


def _bfloat16(values: jax.Array) -> jax.Array:
    """float32 in int32, rounded; rows as `Values.read` says."""
    half = len(values) // 2
    upper, lower = values[:half] + (1 << 15), values[half:] + (1 << 15)
    packed = jax.lax.shift_right_logical(upper, 16) | (lower & -(1 << 16))
    return pltpu.bitcast(packed, jnp.bfloat16)


def _lanes(values: np.ndarray, narrow: bool) -> np.ndarray:
    """float32 values as int32 (lookups, 128); as bfloat16 the first of two is in a low half."""
    bits = values.astype(np.float32).view(np.int32)
    if narrow:
        bits = (bits.view(np.uint32) + np.uint32(1 << 15)) >> np.uint32(16)
        bits = (bits[0::2] | bits[1::2] << np.uint32(16)).view(np.int32)
    return _repeat(bits)


def _repeat(numbers: np.ndarray) -> np.ndarray:
    """int32 (lookups, 128), a short table again and again."""
    return np.resize(numbers, max(len(numbers), LANES)).reshape(-1, LANES).astype(np.int32)
