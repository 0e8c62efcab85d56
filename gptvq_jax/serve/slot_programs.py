"""The programs of the engine (engine.py): all that it runs on the device, each of a fixed shape.

Caches hold the slots of a batch one after the other (`LayerCache`); those of one slot alone are a
batch of one. Which length they have is all that distinguishes two compilations of a program.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.serve.forward import Caches, empty_caches, next_logits, run_blocks
from gptvq_jax.serve.sampling import sample_each

MOST_LIKELY = 20  # tokens whose log-probabilities come with a drawn one, where these are asked for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """How the next token of every slot is drawn; NumPy arrays (batch,), set by the host."""

    keys: Any  # (batch, 2) uint32: data of the keys of draws to come
    temperature: Any  # float32; this and the next two as in `Sampling`
    top_k: Any  # int32
    top_p: Any  # float32
    scored: Any  # bool: whether log-probabilities are asked for

    @classmethod
    def greedy(cls, batch: int) -> "Draws":
        """Of slots that nobody asks anything."""
        return cls(
            np.zeros((batch, 2), np.uint32),
            np.zeros(batch, np.float32),
            np.zeros(batch, np.int32),
            np.ones(batch, np.float32),
            np.zeros(batch, bool),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """Natural logarithms of the model's own probabilities, before temperature and cuts."""

    of_token: Any  # (batch,) float32
    tokens: Any  # (batch, MOST_LIKELY) int32, the likeliest first
    logprobs: Any  # (batch, MOST_LIKELY) float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a step draws, by slot."""

    tokens: Any  # (batch,) int32
    keys: Any  # (batch, 2) uint32: for the next step
    finite: Any  # (batch,) bool: whether the scores were numbers
    scores: Scores  # zeros where none of the slots asks for them


def new_caches(config: ModelConfig, batch: int, length: int, dtype: str) -> Caches:
    """Empty caches, each an array of its own."""
    return jax.tree.map(jnp.copy, empty_caches(config, batch, length, dtype))


@partial(jax.jit, static_argnames=("config", "rows"), donate_argnames="caches")
def read_chunk(
    config: ModelConfig,
    params: Any,
    caches: Caches,
    tokens: jax.Array,
    start: jax.Array,
    rows: int,
) -> tuple[jax.Array, Caches]:
    """Reads some tokens of a prompt, behind what the caches hold of it.

    Args:
      config: static.
      params: the model.
      caches: of one slot; donated.
      tokens: (1, time) int32; padding behind the prompt is any valid token.
      start: position of the first; start + time must be within the caches.
      rows: static; at least time.

    Returns:
      Outputs (rows, hidden) of the last block, zeros behind them, and the caches.
    """
    positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    x, caches = run_blocks(config, params, tokens, caches, positions, start >= 0)
    return jnp.pad(x[0], ((0, rows - x.shape[1]), (0, 0))), caches


@partial(jax.jit, static_argnames="config")
def draw_first(
    config: ModelConfig, params: Any, x: jax.Array, index: jax.Array, draws: Draws
) -> Drawn:
    """The token behind a prompt, from row `index` of the outputs (rows, hidden) of its end."""
    row = lax.dynamic_slice_in_dim(x, index, 1)
    return _draw(next_logits(config, params, row[None])[0], draws)


@partial(jax.jit, static_argnames="config")
def score_chunk(config: ModelConfig, params: Any, x: jax.Array, targets: jax.Array) -> Scores:
    """Of the tokens of a prompt (rows,), each from the outputs (rows, hidden) of the one before."""
    return _scores(next_logits(config, params, x[None])[0], targets)


@partial(jax.jit, static_argnames="config", donate_argnames="caches")
def step(
    config: ModelConfig,
    params: Any,
    caches: Caches,
    tokens: jax.Array,
    positions: jax.Array,
    draws: Draws,
) -> tuple[Drawn, Caches]:
    """Feeds the newest token of every slot to the model and draws the next.

    Args:
      config: static.
      params: the model.
      caches: of all slots; donated.
      tokens, positions: (batch,) int32; those of a slot without a request write what nobody reads.
      draws: of every slot.
    """
    true = positions[0] >= 0
    x, caches = run_blocks(config, params, tokens[:, None], caches, positions[:, None], true)
    return _draw(next_logits(config, params, x)[:, 0], draws), caches


def insert(caches: Caches, slot: int, alone: Caches) -> Caches:
    """Caches of all slots, donated, with those of one slot in its place; lengths are equal."""
    return jax.tree.map(lambda all_, one: _insert(all_, one, np.int32(slot)), caches, alone)


def extract(caches: Caches, slot: int, config: ModelConfig) -> Caches:
    """A copy of the caches of one slot."""
    rows = config.num_key_value_heads
    return jax.tree.map(lambda array: _extract(array, np.int32(slot), rows), caches)


def resized(caches: Caches, length: int) -> Caches:
    """A copy of caches with another length: zeros behind what was there, or without its end."""
    return jax.tree.map(lambda array: _resized(array, length), caches)


@partial(jax.jit, donate_argnums=0)
def _insert(array: jax.Array, one: jax.Array, slot: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(array, one, slot * one.shape[0], axis=0)


@partial(jax.jit, static_argnums=2)
def _extract(array: jax.Array, slot: jax.Array, rows: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, slot * rows, rows)


@partial(jax.jit, static_argnums=1)
def _resized(array: jax.Array, length: int) -> jax.Array:
    if length <= array.shape[1]:
        return array[:, :length]
    return jnp.pad(array, ((0, 0), (0, length - array.shape[1]), (0, 0)))


def _draw(logits: jax.Array, draws: Draws) -> Drawn:
    pairs = jax.vmap(jax.random.split)(jax.random.wrap_key_data(draws.keys))
    keys, now = pairs[:, 0], pairs[:, 1]
    tokens = sample_each(logits, now, draws.temperature, draws.top_k, draws.top_p)
    scores = lax.cond(
        jnp.any(draws.scored), _scores, lambda *_: _no_scores(len(tokens)), logits, tokens
    )
    # The largest of numbers that are not all numbers is none.
    finite = jnp.isfinite(jnp.max(logits, axis=-1))
    return Drawn(tokens, jax.random.key_data(keys), finite, scores)


def _scores(logits: jax.Array, tokens: jax.Array) -> Scores:
    sums = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    of_token = jnp.take_along_axis(logits, tokens[:, None], axis=-1) - sums
    count = min(MOST_LIKELY, logits.shape[-1])
    best, likeliest = lax.top_k(logits, count)
    missing = ((0, 0), (0, MOST_LIKELY - count))
    return Scores(
        of_token[:, 0],
        jnp.pad(likeliest, missing, constant_values=-1).astype(jnp.int32),
        jnp.pad(best - sums, missing, constant_values=-jnp.inf),
    )


def _no_scores(batch: int) -> Scores:
    return Scores(
        jnp.zeros(batch, jnp.float32),
        jnp.zeros((batch, MOST_LIKELY), jnp.int32),
        jnp.zeros((batch, MOST_LIKELY), jnp.float32),
    )
