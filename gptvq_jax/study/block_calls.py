"""The blocks of a step where each is one C++ call: a part that has others in it."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.serve.forward import Caches
from gptvq_jax.serve.native_block import native_step, runs_natively
from gptvq_jax.study.token_parts import Part, on_caches

BLOCKS = "blocks, one call each"
_OUTSIDE = ("embedding", "head, with its norm", "sampling")


def with_block_calls(
    parts: Sequence[Part],
    config: ModelConfig,
    params: Any,
    caches: Caches,
    position: int,
    batch: int,
) -> list[Part]:
    """Parts of a step, with all blocks as one of them if each is a call of its own.

    Args:
      parts: of `token_parts.parts`; those of blocks are marked as within the new one, whose bytes
        and multiply-adds are theirs together.
      config: of the model.
      params: its tree.
      caches: of the sequences, not donated.
      position: tokens before the one that is fed.
      batch: sequences.
    """
    depth = config.num_hidden_layers
    configs = tuple(config.of_block(index) for index in range(depth))
    blocks = [params[f"layers_{index}"] for index in range(depth)]
    shape = (batch, 1, config.hidden_size)
    x = jax.random.normal(jax.random.key(0), shape, caches[0].k.dtype)
    positions = jnp.full((batch, 1), position, jnp.int32)
    each = zip(configs, blocks, caches, strict=True)
    if not all(runs_natively(of, block, x, cache, positions) for of, block, cache in each):
        return list(parts)
    within = [dataclasses.replace(p, within=True) for p in parts if p.name not in _OUTSIDE]
    whole = Part(
        BLOCKS,
        depth,
        sum(part.bytes for part in within),
        sum(part.multiply_adds for part in within),
        *on_caches(_run, configs, blocks, caches, x, positions),
    )
    return [whole, *within, *(part for part in parts if part.name in _OUTSIDE)]


@partial(jax.jit, static_argnames="configs", donate_argnames="caches")
def _run(configs, blocks: list[Any], caches: Caches, x: jax.Array, positions: jax.Array):
    updated = []
    for config, block, cache in zip(configs, blocks, caches, strict=True):
        x, cache = native_step(config, block, x, cache, positions)
        updated.append(cache)
    return x, tuple(updated)
