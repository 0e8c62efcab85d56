"""The Viterbi search on TPUs: one Pallas kernel keeps costs and the way back in VMEM.

A program searches 8 streams, one in each sublane, and goes through all rows of both searches of
`moves.viterbi.tail_biting`. Window s of a stream lies in register s / 128, lane s % 128. The 2^K
windows that one may come from differ in their highest K bits: they lie in different registers, and
the least of them takes compares and selects. The 2^K that follow differ in their lowest K bits:
each minimum goes to 2^K neighbouring lanes, which is one lookup along lanes for each register
written. Below 2^7 groups the highest bits are in lanes too; then minima go round by rotations. A
table shorter than 128 is repeated.

Where a minimum came from takes K bits, and bits of several registers share one of int32: 4 KiB a
row up to L = 13. The trace back looks them up along lanes, for 8 streams at once.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gptvq_jax.ops import viterbi_frame
from gptvq_jax.ops.tpu.codes import pad_axis
from gptvq_jax.ops.tpu.layout import LANE_BITS, LANES, SUBLANES

_MAX_BYTES = 14 * 2**20  # of 16 MiB of VMEM where it is least
_WORD_REGISTERS = 64  # of costs, whose ways back share a register: 32 bits or fewer for any K
_TILE = SUBLANES, LANES


@dataclasses.dataclass(frozen=True)
class _Trellis:
    """Static sizes of a search."""

    bits: int  # L
    rate: int  # K, 1 to 6
    rows: int  # T
    before: int  # rows before the cut, and after it, of the first search
    after: int

    @property
    def registers(self) -> int:
        """Of the costs of all windows."""
        return max(1, 2**self.bits // LANES)

    @property
    def groups(self) -> int:
        """Registers of minima."""
        return max(1, self.registers >> self.rate)

    @property
    def words(self) -> int:
        """Registers of a row's ways back."""
        return max(1, self.registers // _WORD_REGISTERS)

    @property
    def rest(self) -> int:
        """Minima of a row."""
        return 2 ** (self.bits - self.rate)

    @property
    def vmem_bytes(self) -> int:
        registers = 2 * self.registers + self.rows * self.words
        blocks = 6 * SUBLANES * -(-self.rows // LANES) * LANES + 2 * self.registers * LANES
        return 4 * (registers * SUBLANES * LANES + blocks)


def check(bits: int, rows: int) -> None:
    """Raises NotImplementedError for streams whose search does not fit on the chip."""
    taken = _Trellis(bits, 1, rows, 0, 0).vmem_bytes
    if taken > _MAX_BYTES:
        raise NotImplementedError(
            f"a search of {rows} rows and 2^{bits} windows takes {taken / 2**20:.0f} MiB of VMEM, "
            f"more than {_MAX_BYTES >> 20}; set fewer stream_rows"
        )


def tail_biting(
    target: jax.Array,
    weight: jax.Array,
    table: jax.Array,
    rate: int,
    around: tuple[int, int],
    overlap: jax.Array | None = None,
    *,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """`moves.viterbi.tail_biting` by the kernel: windows (n, T) int32 and losses (n,).

    Args:
      target, weight: (n, T) float32.
      table: (2^L,) float32.
      rate: K, 1 to 6 and at most L.
      around: rows before and after the cut that are searched for the overlap.
      overlap: (n,) int32, of each stream, where it is known.
      interpret: as of pl.pallas_call.
    """
    streams, rows = target.shape
    sizes = _Trellis(len(table).bit_length() - 1, rate, rows, *around)
    check(sizes.bits, rows)
    padded = -(-streams // SUBLANES) * SUBLANES, -(-rows // LANES) * LANES
    target, weight = (pad_axis(pad_axis(x, 0, padded[0]), 1, padded[1]) for x in (target, weight))
    if len(table) < LANES:
        table = jnp.tile(table, LANES // len(table))
    known = overlap is not None
    overlap = jnp.broadcast_to(overlap if known else -1, streams)
    overlap = jnp.broadcast_to(pad_axis(overlap, 0, padded[0])[:, None], (padded[0], LANES))
    of_streams = pl.BlockSpec((SUBLANES, padded[1]), lambda i: (i, 0))
    windows, loss = pl.pallas_call(
        partial(_kernel, sizes=sizes, known=known),
        grid=(padded[0] // SUBLANES,),
        in_specs=[
            pl.BlockSpec((sizes.registers, LANES), lambda i: (0, 0)),
            of_streams,
            of_streams,
            pl.BlockSpec(_TILE, lambda i: (i, 0)),
        ],
        out_specs=[of_streams, pl.BlockSpec(_TILE, lambda i: (i, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(padded, jnp.int32),
            jax.ShapeDtypeStruct((padded[0], LANES), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((2, sizes.registers, *_TILE), jnp.float32),
            pltpu.VMEM((rows, sizes.words, *_TILE), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="viterbi",
    )(table.reshape(-1, LANES), target, weight, overlap)
    return windows[:streams, :rows], loss[:streams, 0]


def _kernel(
    table_ref,  # float32 (registers, 128)
    target_ref,  # float32 (8, T), padded
    weight_ref,  # float32 (8, T), padded
    overlap_ref,  # int32 (8, 128), each in all lanes
    windows_ref,  # int32 (8, T), padded
    loss_ref,  # float32 (8, 128)
    cost_ref,  # float32 (2, registers, 8, 128): before and after a row, in turn
    origin_ref,  # int32 (T, words, 8, 128)
    *,
    sizes: _Trellis,
    known: bool,
):
    lane = lax.broadcasted_iota(jnp.int32, _TILE, 1)

    def windows_of(register):
        return (register * LANES + lane) & (2**sizes.bits - 1)

    def distance(register, z, w):
        return w * jnp.square(z - table_ref[pl.ds(register, 1), :])

    def numbers(row):
        """Target and weight of a row, each in all lanes."""
        at, tile = jnp.full(_TILE, row & (LANES - 1)), _lanes_of(row)
        return _take(target_ref[:, tile], at), _take(weight_ref[:, tile], at)

    def cheapest(count, row_of, ends, starts):
        last = numbers(row_of(count - 1))

        def begin(register, _):
            cost = jnp.where(ends(windows_of(register)), distance(register, *last), jnp.inf)
            cost_ref[0, register] = cost

        lax.fori_loop(0, sizes.registers, begin, None)

        def step(k, _):
            i = count - 2 - k
            z, w = numbers(row_of(i))
            _step(cost_ref, k & 1, origin_ref, i, partial(distance, z=z, w=w), sizes)

        lax.fori_loop(0, count - 1, step, None)

        def least_of(register, found):
            least, at = found
            window = windows_of(register)
            cost = jnp.where(starts(window), cost_ref[(count - 1) & 1, register], jnp.inf)
            return jnp.minimum(cost, least), jnp.where(cost < least, window, at)

        none = jnp.full(_TILE, jnp.inf), jnp.zeros(_TILE, jnp.int32)
        least, at = lax.fori_loop(0, sizes.registers, least_of, none)
        loss = jnp.min(least, axis=1, keepdims=True)
        first = jnp.min(jnp.where(least == loss, at, 2**sizes.bits), axis=1, keepdims=True)
        loss_ref[...] = jnp.broadcast_to(loss, _TILE)
        return jnp.broadcast_to(first, _TILE)

    def write(i, window):
        tile = _lanes_of(i)
        here = lane == (i & (LANES - 1))
        windows_ref[:, tile] = jnp.where(here, window, windows_ref[:, tile])

    def after(i, window):
        return _after(origin_ref, i, window, sizes)

    around = None if known else (sizes.before, sizes.after)
    memory = viterbi_frame.Memory(cheapest, write, after)
    viterbi_frame.tail_biting(sizes.bits, sizes.rate, sizes.rows, around, overlap_ref[...], memory)


def _step(cost_ref, now, origin_ref, i, distance, sizes: _Trellis):
    """Costs after row i from those before it, and where they came from."""
    lane = lax.broadcasted_iota(jnp.int32, _TILE, 1)
    fan = sizes.registers // sizes.groups  # registers that a minimum comes from, and goes to
    per_word = sizes.groups // sizes.words

    def word(j, _):
        # All loads come first: the compiler takes every store to be one to what they read. Of the
        # lookups, those that go by the same lanes come together.
        minima = [_least(cost_ref, now, j * per_word + m, sizes) for m in range(per_word)]
        packed = jnp.zeros(_TILE, jnp.int32)
        for m, (_, which) in enumerate(minima):
            packed |= which << (m * sizes.rate)
        for q in range(fan):
            source = ((q * LANES + lane) & (2**sizes.bits - 1)) >> sizes.rate
            for m, (least, _) in enumerate(minima):
                register = (j * per_word + m) * fan + q
                cost_ref[1 - now, register] = _take(least, source) + distance(register)
        origin_ref[i, j] = packed

    lax.fori_loop(0, sizes.words, word, None)


def _least(cost_ref, now, group, sizes: _Trellis):
    """The least cost of each of a register of groups of windows, and their highest K bits there."""
    fan = sizes.registers // sizes.groups
    lane_bits = sizes.rate - (fan.bit_length() - 1)  # of the K, those that lanes tell apart
    lane = lax.broadcasted_iota(jnp.int32, _TILE, 1)
    which = (lane & (2**sizes.bits - 1)) >> (sizes.bits - sizes.rate)
    if lane_bits == 0:
        which = jnp.zeros(_TILE, jnp.int32)
    high, least = which, cost_ref[now, group]
    for b in range(1, fan):
        other = cost_ref[now, b * sizes.groups + group]
        which = jnp.where(other < least, high + (b << lane_bits), which)
        least = jnp.minimum(other, least)
    for i in range(lane_bits):
        shift = sizes.rest << i
        other, origin = pltpu.roll(least, shift, 1), pltpu.roll(which, shift, 1)
        better = (other < least) | ((other == least) & (origin < which))
        least, which = jnp.where(better, other, least), jnp.where(better, origin, which)
    return least, which


def _after(origin_ref, i, window, sizes: _Trellis):
    """The window of row i + 1 that follows that of row i, in all lanes."""
    per_word = sizes.groups // sizes.words
    group = window >> sizes.rate
    register, lane = group >> LANE_BITS, group & (LANES - 1)
    packed = _take(origin_ref[i, 0], lane)
    word = register >> (per_word.bit_length() - 1)
    for j in range(1, sizes.words):
        packed = jnp.where(word == j, _take(origin_ref[i, j], lane), packed)
    high = (packed >> ((register & (per_word - 1)) * sizes.rate)) & (2**sizes.rate - 1)
    return high * sizes.rest + group


def _take(x, lanes):
    return jnp.take_along_axis(x, lanes, axis=1, mode="promise_in_bounds")


def _lanes_of(row):
    """The 128 rows that a row is among."""
    return pl.ds(pl.multiple_of(row >> LANE_BITS << LANE_BITS, LANES), LANES)
