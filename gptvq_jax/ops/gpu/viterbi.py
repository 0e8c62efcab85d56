"""The Viterbi search on NVIDIA GPUs: one Pallas kernel keeps the costs in registers.

A program searches one stream, through all rows of both searches of `moves.viterbi.tail_biting`.
The costs of all 2^L windows are one array; a row reads them as 2^K x 2^(L - K), takes minima, and
writes each 2^K times, by way of shared memory. Where minima came from goes to memory, a byte each;
it is read again soon enough to lie in the cache still, one byte a row.

Triton, and not Mosaic GPU, for the reasons in pallas_gpu.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from gptvq_jax.ops import viterbi_frame

_MAX_BITS = 14  # costs and the table take 2^L registers each, of the 2^16 of a multiprocessor
_WARP_WINDOWS = 512  # 16 costs for each thread


def check(bits: int, rows: int, streams: int) -> None:
    """Raises NotImplementedError for what does not fit on the chip, or needs longer indices."""
    if bits > _MAX_BITS:
        raise NotImplementedError(
            f"2^{bits} costs do not fit in the registers of a program; set window_bits to at most "
            f"{_MAX_BITS}"
        )
    if streams * rows << (bits - 1) >= 2**31:
        raise NotImplementedError(
            f"the way back of {streams} streams of {rows} rows needs 64-bit indices; search fewer "
            "streams at once"
        )


def tail_biting(
    target: jax.Array,
    weight: jax.Array,
    table: jax.Array,
    rate: int,
    around: tuple[int, int],
    overlap: jax.Array | None = None,
    *,
    interpret: bool = False,
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
    size = len(table)
    check(size.bit_length() - 1, rows, streams)
    if overlap is None:
        overlap = jnp.full(streams, -1, jnp.int32)
    else:
        around = None
    windows, loss, _ = pl.pallas_call(
        partial(_kernel, rate=rate, rows=rows, around=around, barrier=not interpret),
        grid=(streams,),
        out_shape=[
            jax.ShapeDtypeStruct((streams, rows), jnp.int32),
            jax.ShapeDtypeStruct((streams,), jnp.float32),
            jax.ShapeDtypeStruct((streams, rows, size >> rate), jnp.uint8),
        ],
        compiler_params=pltriton.CompilerParams(
            num_warps=min(32, max(1, size // _WARP_WINDOWS)), num_stages=1
        ),
        interpret=interpret,
        name="viterbi",
    )(target, weight, table, overlap)
    return windows, loss


def _kernel(
    target_ref,  # float32 (n, T)
    weight_ref,  # float32 (n, T)
    table_ref,  # float32 (2^L,)
    overlap_ref,  # int32 (n,)
    windows_ref,  # int32 (n, T)
    loss_ref,  # float32 (n,)
    origin_ref,  # uint8 (n, T, 2^(L - K))
    *,
    rate: int,
    rows: int,
    around: tuple[int, int] | None,
    barrier: bool,
):
    stream = pl.program_id(0)
    size, fan = table_ref.shape[0], 2**rate
    bits, rest = size.bit_length() - 1, size // fan
    table = table_ref[...]
    window = jnp.arange(size, dtype=jnp.int32)

    def synchronize():
        """What a thread has written is there for the others."""
        if barrier:
            pltriton.debug_barrier()

    def cheapest(count, row_of, ends, starts):
        def distance(i):
            row = row_of(i)
            return weight_ref[stream, row] * jnp.square(target_ref[stream, row] - table)

        def step(k, cost):
            i = count - 2 - k
            groups = cost.reshape(fan, rest)
            origin_ref[stream, i, :] = jnp.argmin(groups, axis=0).astype(jnp.uint8)
            best = jnp.broadcast_to(jnp.min(groups, axis=0)[:, None], (rest, fan))
            return best.reshape(size) + distance(i)

        cost = jnp.where(ends(window), distance(count - 1), jnp.inf)
        cost = lax.fori_loop(0, count - 1, step, cost)
        cost = jnp.where(starts(window), cost, jnp.inf)
        loss_ref[stream] = jnp.min(cost)
        return jnp.argmin(cost).astype(jnp.int32)

    def write(i, at):
        windows_ref[stream, i] = at

    def after(i, at):
        group = at >> rate
        return origin_ref[stream, i, group].astype(jnp.int32) * rest + group

    memory = viterbi_frame.Memory(cheapest, write, after, synchronize)
    viterbi_frame.tail_biting(bits, rate, rows, around, overlap_ref[stream], memory)
