"""Keys and values of the tokens so far: what a layer of the decoder keeps between steps.

Slot p of a sequence holds its position p. Prompts of different lengths are padded on the right: a
query sees slots up to its own position only, and the tokens generated later overwrite the padding
before they reach it. So positions alone say who sees what.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.layers import precision, soft_cap


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Rotated keys and values of one layer, in the dtype of the activations."""

    # One leading axis, so that a product over slots needs no reshape: with two, XLA on a CPU copies
    # the whole cache in every step. Sequence b and head h are at b * kv_heads + h.
    k: jax.Array  # (batch * kv_heads, max_len, head_dim)
    v: jax.Array

    @classmethod
    def zeros(cls, config: ModelConfig, batch: int, max_len: int, dtype) -> "LayerCache":
        """An empty cache with room for max_len positions."""
        # Zeros, because even what a query cannot see must be finite.
        shape = (batch * config.num_key_value_heads, max_len, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def write(self, k: jax.Array, v: jax.Array, positions: jax.Array | None) -> "LayerCache":
        """Stores k and v (batch, time, kv_heads, head_dim) at positions (batch, time).

        Positions must be below max_len; None are 0..time-1.

        Raises:
          ValueError: time is larger than max_len.
        """
        batch, time, kv_heads, head_dim = k.shape
        max_len = self.k.shape[1]
        if time > max_len:
            raise ValueError(f"{time=} tokens do not fit in a cache of {max_len=}")

        def store(cache: jax.Array, new: jax.Array) -> jax.Array:
            new = jnp.swapaxes(new, 1, 2).reshape(batch * kv_heads, time, head_dim)
            if positions is None:
                return cache.at[:, :time].set(new)
            row = jnp.arange(batch * kv_heads)[:, None]
            slot = jnp.repeat(positions, kv_heads, axis=0)
            # Without this promise every write would come with a copy of the cache.
            return cache.at[row, slot].set(new, mode="promise_in_bounds", unique_indices=True)

        return LayerCache(store(self.k, k), store(self.v, v))

    def attend(
        self,
        q: jax.Array,
        positions: jax.Array,
        sliding_window: int | None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> jax.Array:
        """softmax(scale * q k^T) v over the slots that each query sees.

        Args:
          q: (batch, time, heads, head_dim); kv_heads divides heads.
          positions: (batch, time) of the queries, whose own keys are stored already.
          sliding_window: number of positions a token sees, itself included; None: all earlier ones.
          scale: None: 1 / sqrt(head_dim).
          softcap: of the scores, see `layers.soft_cap`.

        Returns:
          (batch, time, heads, head_dim) in the dtype of q; the softmax is float32.
        """
        batch, time, heads, head_dim = q.shape
        rows, max_len, _ = self.k.shape
        kv_heads = rows // batch
        distance = positions[..., None] - jnp.arange(max_len)
        seen = distance >= 0  # (batch, time, max_len)
        if sliding_window is not None:
            seen &= distance < sliding_window
        q = q.reshape(batch, time, kv_heads, -1, head_dim)
        q = jnp.moveaxis(q, 1, 3)  # (batch, kv_heads, group, time, head_dim)
        seen = jnp.broadcast_to(seen[:, None, None], (*q.shape[:4], max_len))
        q, seen = q.reshape(rows, -1, head_dim), seen.reshape(rows, -1, max_len)

        exact = precision(q.dtype, self.k.dtype)
        scores = jnp.einsum(
            "nqd,nsd->nqs", q, self.k, precision=exact, preferred_element_type=jnp.float32
        )
        scores = scores / head_dim**0.5 if scale is None else scores * scale
        scores = jnp.where(seen, soft_cap(scores, softcap), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        mixed = jnp.matmul(weights, self.v, precision=exact)
        mixed = mixed.reshape(batch, kv_heads, heads // kv_heads, time, head_dim)
        return jnp.moveaxis(mixed, 3, 1).reshape(batch, time, heads, head_dim)
