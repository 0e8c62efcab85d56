"""The decoder with its caches, and its head, as programs of generation run them.

Packed weights must be decoded inside the products that read them, every time: where the compiler
sees that it may do so once, before a loop of steps, it holds the whole model dense.
"""

from functools import partial
from typing import Any

import jax
from jax import lax

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.kv_cache import LayerCache
from gptvq_jax.models.llama import block_step, embed, head_logits
from gptvq_jax.serve.native_block import native_step, runs_natively
from gptvq_jax.serve.params import outer_params

Caches = tuple[LayerCache, ...]  # one per layer


def empty_caches(config: ModelConfig, batch: int, max_len: int, dtype: str) -> Caches:
    """Those of sequences that have no tokens yet, with room for max_len positions.

    All layers share one pair of arrays: a program that donates caches needs copies.
    """
    return (LayerCache.zeros(config, batch, max_len, dtype),) * config.num_hidden_layers


def run_blocks(
    config: ModelConfig,
    params: Any,
    tokens: jax.Array,
    caches: Caches,
    positions: jax.Array | None,
    true: jax.Array,
) -> tuple[jax.Array, Caches]:
    """Runs tokens (batch, time) through all blocks.

    One that is not a call of its own (native_block.py) is a branch of a condition that always
    holds, which the compiler does not know. Without it XLA decodes the packed weights of all blocks
    first, or even once before the loop over steps.

    Args:
      config: of the model.
      params: its tree, dense or with packed leaves.
      tokens: int32.
      caches: of these sequences; their dtype is that of the activations.
      positions: (batch, time) of the tokens; None: 0..time-1, of sequences that begin.
      true: a bool that is True, computed from an argument of the program.

    Returns:
      The outputs (batch, time, hidden) of the last block, and the caches with these tokens.
    """
    x = embed(config, params, tokens).astype(caches[0].k.dtype)
    updated = []
    for index, cache in enumerate(caches):
        of_block, block = config.of_block(index), params[f"layers_{index}"]
        if runs_natively(of_block, block, x, cache, positions):
            x, cache = native_step(of_block, block, x, cache, positions)
        else:
            step = partial(block_step, of_block, positions=positions)
            x, cache = lax.cond(true, step, lambda _, x, cache: (x, cache), block, x, cache)
        updated.append(cache)
    return x, tuple(updated)


def next_logits(config: ModelConfig, params: Any, x: jax.Array) -> jax.Array:
    """Scores of the tokens after outputs x (batch, time, hidden): float32 (batch, time, vocab)."""
    # Behind the barrier, or the head is decoded before the loop.
    x, outer = lax.optimization_barrier((x, outer_params(params)))
    return head_logits(config, outer, x)
