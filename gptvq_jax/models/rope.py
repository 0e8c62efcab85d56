"""Rotary position embeddings as Hugging Face's decoders compute them, in float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.rope_scaling import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    YarnRopeScaling,
)


def inverse_frequencies(config: ModelConfig, length: int = 0) -> np.ndarray:
    """Returns the float32 radians per position of every rotated pair, shape (rotary_dim / 2,).

    Args:
      config: of a block (`ModelConfig.of_block`).
      length: of the text; only DynamicRopeScaling heeds it, beyond max_position_embeddings.
    """
    dim = config.rotary_dim or config.head_dim
    scaling = config.rope_scaling
    theta = config.rope_theta
    if isinstance(scaling, DynamicRopeScaling):
        longer = max(length / config.max_position_embeddings, 1)
        theta *= (scaling.factor * longer - (scaling.factor - 1)) ** (dim / (dim - 2))
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    inv_freq = np.float32(1) / np.float32(theta) ** exponent
    if isinstance(scaling, Llama3RopeScaling):
        # Turns that a pair makes within the pretraining context: many are kept, few slowed down.
        turns = scaling.original_max_position_embeddings * inv_freq / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0, 1)
    elif isinstance(scaling, YarnRopeScaling):
        keep = _yarn_keeps(scaling, theta, dim)
    elif isinstance(scaling, LinearRopeScaling):
        return (inv_freq / np.float32(scaling.factor)).astype(np.float32)
    else:
        return inv_freq
    return ((1 - keep) * inv_freq / scaling.factor + keep * inv_freq).astype(np.float32)


def _yarn_keeps(scaling: YarnRopeScaling, theta: float, dim: int) -> np.ndarray:
    """How much of each pair's frequency is kept, (dim / 2,) from 1 down to 0."""

    def index(turns: float) -> float:
        """Of the pair that turns so often within the original context."""
        wavelength = scaling.original_max_position_embeddings / turns
        return dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    return 1 - np.clip((np.arange(dim // 2, dtype=np.float32) - low) / width, 0, 1)


def rotary_tables(
    config: ModelConfig, positions: jax.Array, length: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Returns (cos, sin) for integer positions (..., time), float32 (..., time, rotary_dim / 2).

    Positions may exceed `config.max_position_embeddings`: the formula has no end.
    """
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config, length)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if isinstance(config.rope_scaling, YarnRopeScaling):
        factor = jnp.float32(config.rope_scaling.attention_factor)
        cos, sin = cos * factor, sin * factor
    return cos, sin


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (x[i], x[i + half]) of every head by its position's angles.

    Args:
      x: (batch, time, heads, head_dim), any float dtype; the result has its shape and dtype.
      cos, sin: float32 (time, half) or (batch, time, half) from `rotary_tables`; what a head has
        beyond 2 * half is left as it is.
    """
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = jnp.split(turning.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = (first * cos - second * sin, second * cos + first * sin)
    turned = jnp.concatenate(turned, axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
