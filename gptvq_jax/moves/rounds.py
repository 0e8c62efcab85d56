"""Moves in turn, until a round of them gains too little."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class _Best(NamedTuple):
    state: Any
    loss: jax.Array  # ()
    round: jax.Array  # () rounds done
    gain: jax.Array  # () relative, of the last round


def repeat(
    one_round: Callable[[Any], Any],
    loss_of: Callable[[Any], jax.Array],
    state: Any,
    rounds: int,
    tolerance: float,
) -> Any:
    """The best state that rounds lead to.

    Args:
      one_round: state -> state, for example codebooks and then codes.
      loss_of: state -> (), with everything as it will be stored.
      state: pytree to start from.
      rounds: at most so many.
      tolerance: stop after a round that lowers the loss by no more than this fraction.
    """

    def step(best):
        new = one_round(best.state)
        loss = loss_of(new)
        kept = jax.tree.map(
            lambda new, old: jnp.where(loss < best.loss, new, old),
            (new, loss),
            (best.state, best.loss),
        )
        gain = 1 - loss / jnp.where(best.loss > 0, best.loss, 1.0)
        return _Best(*kept, round=best.round + 1, gain=gain)

    def goes_on(best):
        return (best.round < rounds) & (best.gain > tolerance)

    return lax.while_loop(goes_on, step, _Best(state, loss_of(state), 0, jnp.inf)).state
