"""Text generation: a prefill that reads the prompts, then steps of one token each.

Steps run on the device, a few at a time, in a loop that samples, stores and stops by itself;
between these calls the host gets to see the tokens.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptvq_jax.core.seeds import random_key
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.serve.forward import Caches, empty_caches, next_logits, run_blocks
from gptvq_jax.serve.lengths import padded_length
from gptvq_jax.serve.sampling import Sampling, sample

STEPS_PER_CALL = 8  # tokens between two looks of the host
NO_TOKEN = -1  # in the outputs of a sequence that has ended


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compiled into prefill and decode: their static argument."""

    config: ModelConfig
    stop_tokens: tuple[int, ...]  # a sequence ends with any of these
    sampling: Sampling
    max_len: int  # slots of the caches
    dtype: str  # of the activations and the caches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where every sequence stands between two steps."""

    caches: Caches
    tokens: jax.Array  # (batch,) int32: the newest of each, which no layer has seen yet
    positions: jax.Array  # (batch,) int32: of these tokens
    ended: jax.Array  # (batch,) bool
    key: jax.Array  # for the draws to come


@dataclasses.dataclass(frozen=True)
class Generation:
    """What came out, and how long it took."""

    tokens: list[list[int]]  # by sequence, without the stop token
    compile_seconds: float  # of the run that came first to compile; 0 without one
    prefill_seconds: float
    decode_seconds: float
    decoded: int  # tokens that decode_seconds went into, of all sequences, stop tokens included

    @property
    def tokens_per_second(self) -> float:
        """Of the steps, all sequences together; 0 if there were none."""
        return self.decoded / self.decode_seconds if self.decoded else 0.0


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    dtype: str = "float32",
    compile_first: bool = False,
    on_tokens: Callable[[list[list[int]]], bool | None] = lambda new: None,
) -> Generation:
    """Continues a batch of prompts, each until a stop token or for `max_tokens` tokens.

    Args:
      config: of the model.
      params: its tree, dense or with packed leaves, such as from params.py.
      prompts: token ids; their lengths may differ.
      max_tokens: largest number of new tokens per prompt.
      sampling: how tokens are drawn; None: greedily.
      seed: of the draws.
      stop_tokens: each ends its sequence, and is not part of it.
      dtype: of the activations and of the caches: float32, bfloat16 or float16.
      compile_first: read the prompts twice, so that the times do not contain compilation.
      on_tokens: called every few steps with the new tokens of each sequence; when it returns True,
        there are no further steps.

    Raises:
      ValueError: a prompt is empty, or too long for the model with `max_tokens` more; a seed out of
        range.
    """
    check_prompts(config, prompts, max_tokens)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = np.zeros((len(prompts), padded_length(lengths.max())), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    plan = Plan(
        config=config,
        stop_tokens=tuple(sorted(set(stop_tokens))),
        sampling=sampling or Sampling(),
        max_len=padded_length(lengths.max() + max_tokens),
        dtype=dtype,
    )
    inputs = (plan, params, padded, lengths, random_key(seed))
    compile_seconds = 0.0
    if compile_first:
        start = time.perf_counter()
        jax.block_until_ready(decode(plan, params, prefill(*inputs), 0))
        compile_seconds = time.perf_counter() - start

    tokens: list[list[int]] = [[] for _ in prompts]
    enough = False

    def hand_out(new: np.ndarray) -> int:
        """Appends (batch, n) tokens; returns how many there are, stop tokens included."""
        nonlocal enough
        unseen = (NO_TOKEN, *plan.stop_tokens)
        kept = [[int(token) for token in row if token not in unseen] for row in new]
        for sequence, more in zip(tokens, kept, strict=True):
            sequence += more
        enough = on_tokens(kept) is True
        return int((new != NO_TOKEN).sum())

    start = time.perf_counter()
    state = jax.block_until_ready(prefill(*inputs))
    prefill_seconds = time.perf_counter() - start
    hand_out(np.asarray(state.tokens)[:, None])

    decode_seconds, decoded, left = 0.0, 0, max_tokens - 1
    while left > 0 and not enough and not np.all(state.ended):
        start = time.perf_counter()
        state, new = decode(plan, params, state, min(left, STEPS_PER_CALL))
        new = np.asarray(new)
        decode_seconds += time.perf_counter() - start
        decoded += hand_out(new)
        left -= STEPS_PER_CALL
    return Generation(tokens, compile_seconds, prefill_seconds, decode_seconds, decoded)


def check_prompts(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    context: int | None = None,
) -> None:
    """Raises ValueError if the model cannot continue these prompts by `max_tokens` tokens.

    Args:
      config: of the model.
      prompts: token ids.
      max_tokens: for each.
      context: positions that there are; None: those of the model.
    """
    if not prompts:
        raise ValueError("there is no prompt; give at least one")
    if max_tokens < 1:
        raise ValueError(f"{max_tokens=} must be at least 1")
    limit = context or config.max_position_embeddings
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {index} is empty; give it at least one token")
        if len(prompt) + max_tokens > limit:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens; with {max_tokens=} more it does not fit "
                f"in the {limit} positions of the model; shorten it or lower max_tokens"
            )
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise ValueError(
                f"prompt {index} has a token outside 0..{config.vocab_size - 1}; "
                "the tokenizer is another model's"
            )


@partial(jax.jit, static_argnames="plan")
def prefill(
    plan: Plan, params: Any, prompts: jax.Array, lengths: jax.Array, key: jax.Array
) -> State:
    """Reads prompts (batch, time), padded on the right to equal length, and draws a token of each.

    Args:
      plan: static.
      params: the model.
      prompts: (batch, time) int32; padding must be valid tokens, whichever.
      lengths: (batch,) int32, of the prompts without padding.
      key: of all draws.
    """
    caches = empty_caches(plan.config, len(prompts), plan.max_len, plan.dtype)
    x, caches = run_blocks(plan.config, params, prompts, caches, None, lengths[0] > 0)
    x = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)
    return _next(plan, params, x, caches, lengths, jnp.zeros(len(x), bool), key)


@partial(jax.jit, static_argnames="plan", donate_argnames="state")
def decode(plan: Plan, params: Any, state: State, num_steps: jax.Array) -> tuple[State, jax.Array]:
    """Runs up to `num_steps` steps, at most STEPS_PER_CALL, fewer where every sequence ends.

    The buffers of `state` become those of the new state: it must not be used again.

    Returns:
      The new state, and tokens (batch, STEPS_PER_CALL) int32, NO_TOKEN where none was made.
    """
    new = jnp.full((len(state.tokens), STEPS_PER_CALL), NO_TOKEN, jnp.int32)

    def unfinished(carry):
        step, state, _ = carry
        return (step < num_steps) & ~jnp.all(state.ended)

    def body(carry):
        step, state, new = carry
        alive = ~state.ended
        state = _step(plan, params, state)
        return step + 1, state, new.at[:, step].set(jnp.where(alive, state.tokens, NO_TOKEN))

    _, state, new = lax.while_loop(unfinished, body, (jnp.int32(0), state, new))
    return state, new


def _step(plan: Plan, params: Any, state: State) -> State:
    """Feeds the newest token of every sequence to the model and draws the next."""
    tokens, positions = state.tokens[:, None], state.positions[:, None]
    true = positions[0, 0] > 0
    x, caches = run_blocks(plan.config, params, tokens, state.caches, positions, true)
    # A sequence that has ended repeats its last step, in the same slot.
    after = state.positions + ~state.ended
    return _next(plan, params, x, caches, after, state.ended, state.key)


def _next(plan, params, x, caches, positions, ended, key) -> State:
    """The state after drawing from the outputs x (batch, 1, hidden) of the last block."""
    logits = next_logits(plan.config, params, x)[:, 0]
    key, now = jax.random.split(key)
    tokens = sample(logits, now, plan.sampling)
    if plan.stop_tokens:
        ended |= jnp.isin(tokens, jnp.array(plan.stop_tokens))
    return State(caches, tokens, positions, ended, key)
