"""The best stream of a column: dynamic programming over the 2^L windows that a weight may have.

The window of row r is L bits of the stream from bit r K, least significant first. That of row r - 1
is the same one moved up by K bits, with the K bits of row r - 1 below it. So the search goes from
the last row to the first: each window has 2^K predecessors, which differ in their highest K bits,
and 2^K successors, which differ in their lowest. Rows of one stream are one behind the other, all
streams go side by side, and so do the windows.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.core.trellis_tensor import MAX_RATE
from gptvq_jax.ops.cpu import viterbi as cpu_viterbi
from gptvq_jax.ops.gpu import viterbi as gpu_viterbi
from gptvq_jax.ops.tpu import viterbi as tpu_viterbi

TRACE_BACK = 12  # times the L / K rows of a window, after which all good streams have met


def viterbi(
    target: jax.Array,
    weight: jax.Array,
    table: jax.Array,
    rate: int,
    overlap: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Windows (n, T) int32 of n streams with the least sum of weight (target - table[window])^2.

    Args:
      target, weight: (n, T), T rows of each stream.
      table: (2^L,) float32, what each window stands for.
      rate: K, bits of the stream for each row, 1 to L.
      overlap: (n,) the first L - K bits of each stream, which then also follow its last bit: it
        bites its tail. None: the L - K bits after the last row's own are free.

    Returns:
      The windows, and their loss (n,).
    """
    size, fan = len(table), 2**rate
    rest = size // fan
    states = jnp.arange(size)

    def distance(z, w):
        return w[:, None] * jnp.square(z[:, None] - table)

    def step(cost, at):
        groups = cost.reshape(-1, fan, rest)
        origin = jnp.argmin(groups, axis=1).astype(jnp.uint8 if fan <= 256 else jnp.int32)
        best = jnp.broadcast_to(jnp.min(groups, axis=1)[:, :, None], (len(cost), rest, fan))
        return best.reshape(cost.shape) + distance(*at), origin

    rows = target.T, weight.T
    last = distance(target[:, -1], weight[:, -1])
    if overlap is not None:
        last = jnp.where(states // fan == overlap[:, None], last, jnp.inf)
    cost, origins = lax.scan(step, last, jax.tree.map(lambda x: x[:-1], rows), reverse=True)
    if overlap is not None:
        cost = jnp.where(states % rest == overlap[:, None], cost, jnp.inf)
    first = jnp.argmin(cost, axis=1)

    def follow(state, origin):
        high = jnp.take_along_axis(origin, (state // fan)[:, None], axis=1)[:, 0]
        after = high.astype(jnp.int32) * rest + state // fan
        return after, after

    _, after = lax.scan(follow, first, origins)
    return jnp.concatenate([first[None], after]).T, jnp.min(cost, axis=1)


def tail_biting(
    target: jax.Array,
    weight: jax.Array,
    table: jax.Array,
    rate: int,
    overlap: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`viterbi` of streams that bite their tails, with the overlap that a search around it finds.

    To try every overlap would cost 2^(L - K) searches. A free one over some rows on both sides of
    the cut finds nearly always the same one; given it, or an `overlap`, the rest is exact.
    """
    if overlap is not None:
        return viterbi(target, weight, table, rate, overlap)
    rows = target.shape[1]
    before, after = _around(rows, len(table).bit_length() - 1, rate)

    def around(x):
        return jnp.concatenate([x[:, rows - before :], x[:, :after]], axis=1)

    states, _ = viterbi(around(target), around(weight), table, rate)
    return viterbi(target, weight, table, rate, states[:, before] % (len(table) >> rate))


def search_streams(
    target: jax.Array,
    weight: jax.Array,
    table: jax.Array,
    rate: jax.Array,
    overlap: jax.Array | None = None,
    *,
    native: str = "jax",
) -> tuple[jax.Array, jax.Array]:
    """`tail_biting` at a rate that a program finds out as it runs; windows of 0 at rate 0.

    Args:
      target, weight: (n, T), T at least L.
      table: (2^L,).
      rate: () int32, 0 to the smaller of MAX_RATE and L.
      overlap: (n,) int32, the first L - K bits of each stream, where they are known.
      native: "jax", or a kernel that the caller knows to run here (`ops.viterbi.choose_search`):
        "cpu" (C++), "pallas_tpu", "pallas_gpu".
    """
    if native == "cpu":
        return cpu_viterbi.tail_biting(target, weight, table, rate, TRACE_BACK, overlap)
    if native not in _SEARCHES:
        raise ValueError(f"native={native!r} must be one of {', '.join(['cpu', *_SEARCHES])}")

    def nothing(target, weight):
        return jnp.zeros(target.shape, jnp.int32), jnp.zeros(len(target))

    def at_rate(rate):
        return lambda target, weight: _SEARCHES[native](target, weight, table, rate, overlap)

    most = min(MAX_RATE, len(table).bit_length() - 1)
    return lax.switch(rate, [nothing, *map(at_rate, range(1, most + 1))], target, weight)


def _around(rows: int, bits: int, rate: int) -> tuple[int, int]:
    """Rows before and after the cut of T whose free search finds the overlap."""
    reach = TRACE_BACK * -(-bits // rate)
    return min(reach, rows // 2), min(reach, rows - rows // 2)


def _by_kernel(module, target, weight, table, rate, overlap):
    around = _around(target.shape[1], len(table).bit_length() - 1, rate)
    return module.tail_biting(target, weight, table, rate, around, overlap)


_SEARCHES = {
    "jax": tail_biting,
    "pallas_tpu": partial(_by_kernel, tpu_viterbi),
    "pallas_gpu": partial(_by_kernel, gpu_viterbi),
}
