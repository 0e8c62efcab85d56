"""The next token from its logits: greedy, or drawn at a temperature from the likeliest tokens."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; hashable, so usable as a static argument of jit.

    Raises:
      ValueError: a field is out of range.
    """

    temperature: float = 0.0  # divides the logits; 0: the likeliest token, always
    top_k: int = 0  # draw from so many of the likeliest tokens; 0: from all
    top_p: float = 1.0  # draw from the fewest likeliest tokens that have this probability together

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or larger")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (off) or larger")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1 (off)")


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws a token for each sequence, first cut to top_k, then to top_p of what is left.

    Args:
      logits: (batch, vocab) float32.
      key: of this step.
      sampling: static.

    Returns:
      Tokens (batch,) int32.
    """
    if sampling.temperature == 0:
        return likeliest_tokens(logits)
    tokens = None
    if 0 < sampling.top_k < logits.shape[-1]:
        logits, tokens = lax.top_k(logits, sampling.top_k)
    # Less their maximum, logits stay finite at any temperature.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_p < 1:
        logits = jnp.where(in_top_p(jax.nn.softmax(logits), sampling.top_p), logits, -jnp.inf)
    drawn = jax.random.categorical(key, logits)
    if tokens is not None:
        drawn = jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0]
    return drawn.astype(jnp.int32)


def sample_each(
    logits: jax.Array,
    keys: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
) -> jax.Array:
    """Draws a token for each sequence by settings of its own, which are arrays.

    A sequence draws what `sample` draws for it alone with its key and no top_k. Of tokens that are
    as likely as the last of top_k, all are let in.

    Args:
      logits: (batch, vocab) float32.
      keys: (batch,) of this step.
      temperature, top_k, top_p: (batch,), as the fields of `Sampling`.

    Returns:
      Tokens (batch,) int32.
    """
    likeliest = likeliest_tokens(logits)

    def draw() -> jax.Array:
        heat = jnp.where(temperature > 0, temperature, 1)[:, None]
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / heat
        probabilities = jax.nn.softmax(scaled)
        ones = jnp.ones_like(probabilities)
        among = (top_k <= 0)[:, None] | _likeliest(probabilities, ones, top_k[:, None])
        scaled = jnp.where(among, scaled, -jnp.inf)
        within = (top_p >= 1)[:, None] | in_top_p(jax.nn.softmax(scaled), top_p[:, None])
        drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(within, scaled, -jnp.inf))
        return jnp.where(temperature > 0, drawn.astype(jnp.int32), likeliest)

    return lax.cond(jnp.any(temperature > 0), draw, lambda: likeliest)


def likeliest_tokens(logits: jax.Array) -> jax.Array:
    """The first of the tokens whose logit (batch, vocab) is largest: (batch,) int32.

    The last token where a logit is no number. Two reductions of numbers: one of pairs, as argmax
    is, goes through them one by one on a CPU, 3 times as slow for one sequence and 16 for eight.
    """
    vocab = logits.shape[-1]
    best = jnp.max(logits, axis=-1, keepdims=True)
    at = jnp.where(logits == best, jnp.arange(vocab, dtype=jnp.int32), vocab - 1)
    return jnp.min(at, axis=-1)


def in_top_p(probabilities: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Marks the fewest likeliest tokens whose probabilities add up to at least top_p.

    Tokens of equal probability are let in together.

    Args:
      probabilities: (batch, vocab) float32 that add up to 1.
      top_p: above 0, at most 1; or one for each row, (batch, 1).

    Returns:
      (batch, vocab) bool, at least one of a row true.
    """
    return _likeliest(probabilities, probabilities, top_p)


def _likeliest(probabilities: jax.Array, weights: jax.Array, enough: Any) -> jax.Array:
    """Marks the fewest likeliest tokens whose weights add up to at least `enough`.

    Bisection for the smallest probability that is let in; no sort, which is 10 times as slow on a
    CPU.
    """
    # Floats that are not negative are ordered as their bits are as integers.
    bits = lax.bitcast_convert_type(probabilities, jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # tokens from `low` on are enough, from `high` on they are not
        middle = low + (high - low) // 2
        mass = jnp.sum(jnp.where(bits >= middle, weights, 0), axis=-1, keepdims=True)
        suffices = mass >= enough
        return jnp.where(suffices, middle, low), jnp.where(suffices, high, middle)

    high = jnp.max(bits, axis=-1, keepdims=True) + 1
    low, _ = lax.fori_loop(0, 31, halve, (jnp.zeros_like(high), high))
    return bits >= low
