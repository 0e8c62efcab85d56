"""What is said of each next token, from outputs of the last block: logits of a chunk at a time."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.core import divergence
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.head_chunk import head_chunk, pair_chunk
from gptvq_jax.models.llama import Params, head_logits


@partial(jax.jit, static_argnames="config")
def token_nll(config: ModelConfig, outer: Params, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """Negative log-likelihood of each next token.

    Args:
      config: of the model.
      outer: its tree without blocks.
      x: outputs of the last block (batch, T, hidden).
      tokens: (batch, T).

    Returns:
      (batch, T - 1) float32, in nats.
    """

    def chunk(targets, x):
        logits = head_logits(config, outer, x)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    return _by_chunk(chunk, head_chunk(config, len(tokens)), tokens, x)


@partial(jax.jit, static_argnames=("config", "reference_config"))
def token_figures(
    config: ModelConfig,
    outer: Params,
    x: jax.Array,
    reference_config: ModelConfig,
    reference_outer: Params,
    reference_x: jax.Array,
    tokens: jax.Array,
) -> jax.Array:
    """What two models of one vocabulary say of each next token.

    Args:
      config, outer, x: as in `token_nll`, of the model.
      reference_config, reference_outer, reference_x: of the one that it is compared with.
      tokens: (batch, T).

    Returns:
      (batch, T - 1, 4) float32, divergence.FIGURES.
    """

    def chunk(targets, x, reference_x):
        logits = head_logits(config, outer, x)
        reference = head_logits(reference_config, reference_outer, reference_x)
        return divergence.token_figures(logits, reference, targets)

    return _by_chunk(chunk, pair_chunk(config, len(tokens)), tokens, x, reference_x)


def _by_chunk(
    of_chunk: Callable[..., jax.Array], size: int, tokens: jax.Array, *hidden: jax.Array
) -> jax.Array:
    """`of_chunk` of targets (batch, size) and what they are predicted from (batch, size, hidden).

    Args:
      of_chunk: gives (batch, size, ...).
      size: of a chunk.
      tokens: (batch, T).
      hidden: arrays (batch, T, hidden).

    Returns:
      (batch, T - 1, ...).
    """
    batch, time = tokens.shape
    pad = -(time - 1) % size

    def chunks(array):
        array = jnp.pad(array, ((0, 0), (0, pad)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(array.reshape(batch, -1, size, *array.shape[2:]), 1, 0)

    arrays = chunks(tokens[:, 1:]), *(chunks(x[:, :-1]) for x in hidden)
    result = jnp.moveaxis(lax.map(lambda parts: of_chunk(*parts), arrays), 0, 1)
    return result.reshape(batch, -1, *result.shape[3:])[:, : time - 1]
