"""Where the time of a token goes: a step of generation, and its parts, measured in turn."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.serve.forward import Caches, empty_caches
from gptvq_jax.serve.generate import STEPS_PER_CALL, Plan, State, decode
from gptvq_jax.serve.lengths import padded_length
from gptvq_jax.serve.sampling import Sampling
from gptvq_jax.study.block_calls import with_block_calls
from gptvq_jax.study.token_parts import Part, parts

REST = "the rest"  # of a step: dispatch, and what of the parts does not add up


class Steps:
    """Greedy steps, by the program of generation, from one position again and again.

    Args:
      config: of the model.
      params: its tree.
      position: tokens before the first that is fed.
      batch: sequences.
      dtype: of the activations and the caches.

    Attributes:
      parts: of a step.

    Raises:
      ValueError: the model has fewer positions.
    """

    def __init__(
        self, config: ModelConfig, params: Any, position: int, batch: int, dtype: str = "float32"
    ):
        limit = config.max_position_embeddings
        if not 1 <= position <= limit - STEPS_PER_CALL:
            raise ValueError(
                f"context={position} must be from 1 to {limit - STEPS_PER_CALL}: the model has "
                f"{limit} positions, and {STEPS_PER_CALL} steps follow"
            )
        length = padded_length(position + STEPS_PER_CALL)
        self._plan = Plan(config, (), Sampling(), length, dtype)
        self._params, self._position = params, position
        caches = _filled(empty_caches(config, batch, length, dtype))
        of_step = parts(config, params, caches, position, batch)
        self.parts: list[Part] = with_block_calls(of_step, config, params, caches, position, batch)
        self._state = State(
            caches=caches,
            tokens=jnp.arange(batch, dtype=jnp.int32) % config.vocab_size,
            positions=jnp.full(batch, position, jnp.int32),
            ended=jnp.zeros(batch, bool),
            key=jax.random.key(0),
        )

    def run(self) -> np.ndarray:
        """STEPS_PER_CALL steps; returns their tokens (batch, steps), read by the host."""
        start = jnp.full_like(self._state.positions, self._position)
        state = dataclasses.replace(self._state, positions=start)
        self._state, tokens = decode(self._plan, self._params, state, STEPS_PER_CALL)
        return np.asarray(tokens)


def measure(
    steps: Mapping[str, Steps],
    repeats: int,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """All models and all parts in turn, in every round.

    Args:
      steps: by the name of what they run on.
      repeats: rounds.
      on_round: called after the first, which compiles, and after each of `repeats`.

    Returns:
      {name: {"seconds": of a step (median), "quartiles", "rows": [{"part", "calls", "bytes",
      "multiply_adds", "within" (another part), "seconds" (median, of a step), "quartiles"}, ...]}}.
      The last row, REST, is what a step takes beyond its parts, but those within others: the median
      of the differences of a round; it is negative where parts take longer alone than within a
      step.
    """
    whole = {name: np.empty(repeats) for name in steps}
    of_parts = {name: np.empty((len(each.parts), repeats)) for name, each in steps.items()}
    for number in range(-1, repeats):
        for name, each in steps.items():
            seconds = _seconds(each.run) / STEPS_PER_CALL
            spent = [_seconds(part.run) - _seconds(part.nothing) for part in each.parts]
            if number >= 0:
                whole[name][number], of_parts[name][:, number] = seconds, spent
        on_round()
    found = {}
    for name, each in steps.items():
        rows = []
        for part, measured in zip(each.parts, of_parts[name], strict=True):
            said = {"part": part.name, "calls": part.calls, "bytes": part.bytes}
            said |= {"multiply_adds": part.multiply_adds, "within": part.within}
            rows.append({**said, **_spread(measured)})
        own = [not part.within for part in each.parts]
        said = {"part": REST, "calls": 1, "bytes": 0, "multiply_adds": 0, "within": False}
        rows.append({**said, **_spread(whole[name] - of_parts[name][own].sum(0))})
        found[name] = {**_spread(whole[name]), "rows": rows}
    return found


def bound(row: Mapping[str, Any], copy_bandwidth: float, multiply_rate: float) -> float:
    """Seconds that a part must take: its bytes at the rate of a copy, or its products at theirs.

    Args:
      row: of `measure`.
      copy_bandwidth: bytes per second, read and written.
      multiply_rate: FLOP/s, of which a multiply-add is two.
    """
    return max(row["bytes"] / copy_bandwidth, 2 * row["multiply_adds"] / multiply_rate)


def _filled(caches: Caches) -> Caches:
    # Each its own arrays, which are donated; of a size that no softmax is a single 1 of.
    def array(zeros: jax.Array) -> jax.Array:
        return 0.1 * jax.random.normal(jax.random.key(3), zeros.shape, zeros.dtype)

    return jax.tree.map(array, caches)


def _spread(measured: np.ndarray) -> dict[str, Any]:
    low, median, high = np.quantile(measured, (0.25, 0.5, 0.75))
    return {"seconds": float(median), "quartiles": [float(low), float(high)]}


def _seconds(program: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program())
    return time.perf_counter() - start
