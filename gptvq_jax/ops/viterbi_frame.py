"""What the kernels of the Viterbi search have in common: two searches, and the way back of each.

`moves.viterbi.tail_biting` searches some rows around the cut of a stream to find the overlap, and
then all rows with it. How costs and the ways back lie in memory is the kernel's own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Condition = Callable[[jax.Array], jax.Array]  # windows -> bool, of each


class Memory(NamedTuple):
    """How a kernel does a search; windows are int32 of whatever shape it has for its streams."""

    # (rows, the stream's row of each, windows that may end, windows that may start) -> windows of
    # row 0 at least cost, with ways back written for all rows after it
    cheapest: Callable[[jax.Array, Callable, Condition, Condition], jax.Array]
    write: Callable[[jax.Array, jax.Array], None]  # the window of a row, as the result
    after: Callable[[jax.Array, jax.Array], jax.Array]  # row, its window -> that of the next row
    synchronize: Callable[[], None] = lambda: None  # what was written can be read


def tail_biting(
    bits: int,
    rate: int,
    rows: int,
    around: tuple[int, int] | None,
    overlap: jax.Array,
    memory: Memory,
) -> None:
    """Searches streams of T rows twice; the second search's windows and losses stand in the end.

    Args:
      bits, rate: L and K.
      rows: T.
      around: rows before and after the cut that are searched for the overlap; None: it is known.
      overlap: of each stream; -1 where it is not known yet.
      memory: of the kernel.
    """
    before, after = around or (0, 0)
    rest = 2 ** (bits - rate)

    def search(turn, overlap):
        """Once around the cut with no overlap given, then all rows with the one found."""
        start = (1 - turn) * (rows - before)
        count = before + after + turn * (rows - before - after)
        follows = before + turn * (rows - 1 - before)

        def row_of(i):
            row = start + i
            return jnp.where(row >= rows, row - rows, row)

        def ends(window):
            return (overlap < 0) | (window >> rate == overlap)

        def starts(window):
            return (overlap < 0) | ((window & (rest - 1)) == overlap)

        first = memory.cheapest(count, row_of, ends, starts)
        memory.synchronize()

        def follow(i, window):
            memory.write(i, window)
            return memory.after(i, window)

        found = lax.fori_loop(0, follows, follow, first)
        memory.write(follows, found)
        memory.synchronize()
        return found & (rest - 1)

    lax.fori_loop(0 if around else 1, 2, search, overlap)
