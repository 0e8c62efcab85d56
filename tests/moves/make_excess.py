"""The table of moves/excess.py: what codes of L bits a window and K a weight make of a Gaussian.

  PYTHONPATH=. python tests/moves/make_excess.py 4 16    # L = 4 to 16, as in moves/excess.py

Each row is L: (its best spread, its excess) for K = 1 up.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.core.trellis_table import gaussian_values
from gptvq_jax.core.trellis_tensor import MAX_RATE
from gptvq_jax.moves.viterbi import search_streams
from gptvq_jax.ops.cpu import viterbi as cpu_viterbi

STEP = 0.04  # of the spreads that are tried


def excess(bits: int, rate: int, spread: float, streams: int = 128, rows: int = 256) -> float:
    """Mean squared error over 4^-K of a Gaussian searched for at a spread, at its best scale."""
    target = np.random.default_rng(0).normal(size=(streams, rows)).astype(np.float32)
    table = gaussian_values(bits)
    native = "cpu" if cpu_viterbi.available() else "jax"
    search = jax.jit(search_streams, static_argnames="native")
    windows, _ = search(
        jnp.asarray(target * spread), jnp.ones_like(target), table, jnp.int32(rate), native=native
    )
    coded = np.asarray(table)[np.asarray(windows)].astype(np.float64)
    scale = np.sum(coded * target) / np.sum(coded * coded)
    return float(np.mean((target - scale * coded) ** 2) / np.mean(target**2) * 4**rate)


def best(bits: int, rate: int, start: float = 1.0, **size) -> tuple[float, float]:
    """The spread of least excess, on a grid, and that excess."""
    found = {}

    def at(step):
        if step not in found:
            found[step] = excess(bits, rate, 1 + STEP * step, **size)
        return found[step]

    step = round((start - 1) / STEP)
    while True:
        nearest = min((step - 1, step, step + 1), key=at)
        if nearest == step:
            break
        step = nearest
    low, mid, high = at(step - 1), at(step), at(step + 1)
    vertex = step + 0.5 * (low - high) / (low - 2 * mid + high)
    return 1 + STEP * vertex, mid


if __name__ == "__main__":
    for L in range(int(sys.argv[1]), int(sys.argv[2]) + 1):
        spread, pairs = 1.1, []
        for K in range(1, min(L, MAX_RATE) + 1):
            spread, least = best(L, K, spread)
            pairs.append((round(spread, 2), round(least, 2)))
        print(f"    {L}: {tuple(pairs)},", flush=True)
