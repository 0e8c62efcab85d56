"""Perplexity, one transformer block in memory at a time."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import block_forward, embed, head_logits
from gptvq_jax.models.source import ModelSource

PRECISION = "multiplied in float32"  # models/layers.py sees to it, the packed kernels too
_TIME_CHUNK = 256  # tokens whose logits are in memory at once
_CACHE_BYTES = 2 << 30  # activations held at once; more text makes more passes over the blocks


def perplexity(
    source: ModelSource,
    windows: np.ndarray,
    batch_size: int = 4,
    on_block: Callable[[], None] = lambda: None,
) -> float:
    """exp of the mean negative log-likelihood of tokens 2..T of every window; inf above 709 nats.

    Activations are float32 and are multiplied as float32 (`PRECISION`), whatever the device and the
    dtype of the weights. Of as many windows as fit in 2 GiB; each group of windows costs one pass
    over the model's blocks.

    Args:
      source: any model, dense or packed.
      windows: tokens (n, T) int32.
      batch_size: windows per forward pass.
      on_block: called after every block, `passes(source, windows) * num_hidden_layers` times.
    """
    outer = source.outer()
    nll = []
    for group in _groups(source.config, windows):
        batches = [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
        activations = [np.asarray(embed(outer, batch), np.float32) for batch in batches]
        for index in range(source.config.num_hidden_layers):
            block = jax.device_put(source.block(index))
            for i, x in enumerate(activations):
                activations[i] = np.asarray(block_forward(source.config, block, x))
            on_block()
        device_outer = jax.device_put(outer)
        for x, tokens in zip(activations, batches, strict=True):
            nll.append(np.asarray(token_nll(source.config, device_outer, x, tokens)))
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.exp(np.concatenate(nll).astype(np.float64).mean()))


def passes(config: ModelConfig, windows: np.ndarray) -> int:
    """Passes over the model's blocks that `perplexity` makes."""
    return len(_groups(config, windows))


def _groups(config: ModelConfig, windows: np.ndarray) -> list[np.ndarray]:
    per_window = windows.shape[1] * config.hidden_size * 4
    size = max(1, _CACHE_BYTES // per_window)
    return [windows[i : i + size] for i in range(0, len(windows), size)]


@partial(jax.jit, static_argnames="config")
def token_nll(config: ModelConfig, outer, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """Negative log-likelihood of each next token.

    Args:
      config: of the model.
      outer: its tree without blocks.
      x: outputs of the last block (batch, T, hidden).
      tokens: (batch, T).

    Returns:
      (batch, T - 1) float32, in nats.
    """
    batch, time = tokens.shape
    pad = -(time - 1) % _TIME_CHUNK
    x = jnp.pad(x[:, :-1], ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, pad)))
    x = jnp.moveaxis(x.reshape(batch, -1, _TIME_CHUNK, x.shape[-1]), 1, 0)
    targets = jnp.moveaxis(targets.reshape(batch, -1, _TIME_CHUNK), 1, 0)

    def chunk(args):
        x, target = args
        logits = head_logits(config, outer, x)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    nll = jnp.moveaxis(lax.map(chunk, (x, targets)), 0, 1)
    return nll.reshape(batch, -1)[:, : time - 1]
