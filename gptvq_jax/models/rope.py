"""Rotary position embeddings as Hugging Face's Llama computes them, in float32."""

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.models.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Returns the float32 radians per position of every rotated pair, shape (head_dim / 2,)."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    inv_freq = np.float32(1) / np.float32(config.rope_theta) ** exponent
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq

    # Turns that a pair makes within the pretraining context: many are kept, few are slowed down.
    turns = scaling.original_max_position_embeddings * inv_freq / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - keep) * inv_freq / scaling.factor + keep * inv_freq).astype(np.float32)


def rotary_tables(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (cos, sin) for integer positions (..., time), float32 (..., time, head_dim / 2).

    Positions may exceed `config.max_position_embeddings`: the formula has no end.
    """
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (x[i], x[i + head_dim / 2]) of every head by its position's angles.

    Args:
      x: (batch, time, heads, head_dim), any float dtype; the result has its shape and dtype.
      cos, sin: float32 (time, head_dim / 2) or (batch, time, head_dim / 2) from `rotary_tables`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
