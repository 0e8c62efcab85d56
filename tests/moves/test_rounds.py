"""repeat: rounds whose losses are written down beforehand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.moves.rounds import repeat


@jax.jit
def run(losses, rounds, tolerance):
    """Loss n is that of the state after n rounds; returns the state that is kept, twice."""
    start = {"round": jnp.int32(0), "twice": jnp.zeros(2, jnp.int32)}

    def one_round(state):
        return {"round": state["round"] + 1, "twice": state["twice"] + 1}

    return repeat(one_round, lambda state: losses[state["round"]], start, rounds, tolerance)


@pytest.mark.parametrize(
    "losses, rounds, tolerance, kept",
    [
        ([8, 4, 2, 1, 0.5], 0, 0.0, 0),
        ([8, 4, 2, 1, 0.5], 1, 0.0, 1),
        ([8, 4, 2, 1, 0.5], 3, 0.0, 3),
        # A gain of exactly the tolerance is too little, and is kept; one above it goes on.
        ([8, 4, 2, 1, 0.5], 4, 0.5, 1),
        ([8, 4, 2, 1, 0.5], 4, 0.49, 4),
        ([8, 4, 3.9, 1, 0.5], 4, 0.1, 2),
        # A round that loses or gains nothing is the last one, and is not kept.
        ([8, 4, 5, 1, 0.5], 4, 0.0, 1),
        ([8, 4, 4, 1, 0.5], 4, 0.0, 1),
        ([8, 9, 1, 1, 1], 4, 0.9, 0),
        ([8, 4, np.nan, 1, 0.5], 4, 0.0, 1),
        ([0, 0, 0, 0, 0], 4, 0.0, 0),
        ([8, 0, 0, 0, 0], 4, 0.0, 1),
    ],
)
def test_the_best_round_is_kept(losses, rounds, tolerance, kept):
    state = run(jnp.array(losses, jnp.float32), rounds, tolerance)
    assert state["round"] == kept
    np.testing.assert_array_equal(state["twice"], [kept, kept])
