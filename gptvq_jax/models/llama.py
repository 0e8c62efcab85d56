"""Llama-family decoder (Llama 2/3, Mistral, SmolLM2) in Flax Linen, whole or one block at a time.

The parameters are plain nested dicts, named as in Hugging Face's checkpoints; kernels are (in, out)
as everywhere in Flax:

    {"embed_tokens": {"embedding"}, "layers_0": BLOCK, ..., "norm": {"scale"},
     "lm_head": {"kernel"}}                                    # no lm_head when embeddings are tied
    BLOCK = {"input_layernorm": {"scale"},
             "self_attn": {"q_proj": {"kernel"}, "k_proj": .., "v_proj": .., "o_proj": ..},
             "post_attention_layernorm": {"scale"},
             "mlp": {"gate_proj": {"kernel"}, "up_proj": .., "down_proj": ..}}

`outer` below is this tree without its layers_i. Computation runs in the dtype of the activations;
norm statistics, rotary tables, softmax and logits are float32. Float32 activations are multiplied
as float32 on every kind of device (`layers.precision`).
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.kv_cache import LayerCache
from gptvq_jax.models.layers import Embedding, Linear, RMSNorm, look_up, precision
from gptvq_jax.models.rope import rotary_tables, rotate

Params = Mapping[str, Any]

# Linear layers of a block that read the same input, in order of evaluation.
LINEAR_GROUPS = (
    ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
    ("self_attn/o_proj",),
    ("mlp/gate_proj", "mlp/up_proj"),
    ("mlp/down_proj",),
)
LINEAR_LAYERS = tuple(name for group in LINEAR_GROUPS for name in group)
HEAD_CHUNK = 256  # tokens whose logits are in memory at once while losses are computed


class Attention(nn.Module):
    """Causal grouped-query self-attention with rotary positions, (batch, time, hidden) -> same.

    Arguments are those of DecoderBlock.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: LayerCache | None = None, positions: jax.Array | None = None
    ) -> Any:
        config = self.config
        batch, time, hidden = x.shape
        head_dim, kv_heads = config.head_dim, config.num_key_value_heads

        def heads(name: str, count: int) -> jax.Array:
            projected = Linear(count * head_dim, name=name)(x)
            return projected.reshape(batch, time, count, head_dim)

        q = heads("q_proj", config.num_attention_heads)
        k = heads("k_proj", kv_heads)
        v = heads("v_proj", kv_heads)
        cos, sin = rotary_tables(config, jnp.arange(time) if positions is None else positions)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            cache = cache.write(k, v, positions)
        if positions is None:
            # A prefill is one program of all layers: fewer chunks keep it quick to compile.
            chunk_size = 128 if cache is None else 512
            mixed = causal_attention(q, k, v, config.sliding_window, chunk_size)
        else:
            mixed = cache.attend(q, positions, config.sliding_window)
        y = Linear(hidden, name="o_proj")(mixed.reshape(batch, time, -1))
        return y if cache is None else (y, cache)


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sliding_window: int | None = None,
    chunk_size: int = 128,
) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v over the current and earlier positions.

    Queries go in chunks, each against only the keys it can see: half the work of a masked square,
    never time x time scores in memory, and 2 to 3 times as fast on a CPU. The traced program grows
    with time / chunk_size.

    Args:
      q: (batch, time, heads, head_dim).
      k, v: (batch, time, kv_heads, head_dim); kv_heads divides heads.
      sliding_window: number of positions a token sees, itself included; None: all earlier ones.
      chunk_size: queries per chunk.

    Returns:
      (batch, time, heads, head_dim) in the dtype of q; the softmax is float32.
    """
    time = q.shape[1]
    reach = time if sliding_window is None else sliding_window
    chunks = []
    for start in range(0, time, chunk_size):
        stop = min(start + chunk_size, time)
        first = max(0, start - reach + 1)
        distance = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)
        seen = (distance >= 0) & (distance < reach)
        # It takes its precision from the context alone.
        with jax.default_matmul_precision(precision(q.dtype)):
            chunk = jax.nn.dot_product_attention(
                q[:, start:stop], k[:, first:stop], v[:, first:stop], mask=seen[None, None]
            )
        chunks.append(chunk)
    return jnp.concatenate(chunks, axis=1)


class MLP(nn.Module):
    """The gated feed-forward layer down(silu(gate(x)) * up(x)), (..., hidden) -> same."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = Linear(self.config.intermediate_size, name="gate_proj")(x)
        up = Linear(self.config.intermediate_size, name="up_proj")(x)
        return Linear(x.shape[-1], name="down_proj")(nn.silu(gate) * up)


class DecoderBlock(nn.Module):
    """One transformer block, (batch, time, hidden) -> same.

    Without a cache, x is at positions 0..time-1 and sees nothing else. With one, its keys and
    values are stored there, and the result is (x, cache). Then `positions` (batch, time) says
    where x is in its sequences, of which it sees what the cache holds; None: 0..time-1, as above.
    """

    config: ModelConfig

    def setup(self):
        self.input_layernorm = RMSNorm(self.config.rms_norm_eps)
        self.self_attn = Attention(self.config)
        self.post_attention_layernorm = RMSNorm(self.config.rms_norm_eps)
        self.mlp = MLP(self.config)

    def __call__(
        self, x: jax.Array, cache: LayerCache | None = None, positions: jax.Array | None = None
    ) -> Any:
        mixed = self.self_attn(self.input_layernorm(x), cache, positions)
        if cache is not None:
            mixed, cache = mixed
        x = x + mixed
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x if cache is None else (x, cache)


class Decoder(nn.Module):
    """The whole model, tokens (batch, time) int -> logits (batch, time, vocab) float32."""

    config: ModelConfig

    def setup(self):
        config = self.config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderBlock(config) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.vocab_size, out_dtype=jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def head(self, x: jax.Array) -> jax.Array:
        """Final norm and output projection, (batch, time, hidden) -> float32 logits."""
        x = self.norm(x)
        if not self.config.tie_word_embeddings:
            return self.lm_head(x)
        return self.embed_tokens.attend(x)


def embed(outer: Params, tokens: jax.Array) -> jax.Array:
    """Looks tokens (batch, time) up, giving (batch, time, hidden) in the embedding's dtype.

    A token outside the vocabulary gives NaN, not another token's vector.
    """
    return look_up(outer["embed_tokens"]["embedding"], tokens)


@functools.partial(jax.jit, static_argnames="config")
def block_forward(config: ModelConfig, block_params: Params, x: jax.Array) -> jax.Array:
    """Runs one block on activations x (batch, time, hidden), giving the next block's x."""
    return DecoderBlock(config).apply({"params": block_params}, x)


@functools.partial(jax.jit, static_argnames="config")
def block_step(
    config: ModelConfig,
    block_params: Params,
    x: jax.Array,
    cache: LayerCache,
    positions: jax.Array | None = None,
) -> tuple[jax.Array, LayerCache]:
    """Runs one block with its cache; arguments are those of DecoderBlock."""
    return DecoderBlock(config).apply({"params": block_params}, x, cache, positions)


@functools.partial(jax.jit, static_argnames="config")
def block_forward_with_inputs(
    config: ModelConfig, block_params: Params, x: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs one block and also returns what its linear layers read.

    Returns:
      The next block's x, and {first name of the group: inputs (batch, time, in)} with one entry
      per group of LINEAR_GROUPS, whose layers all read that same array. Iterate LINEAR_GROUPS for
      the order of evaluation: jit sorts the keys of a dict.
    """
    variables = {"params": block_params}
    x, state = DecoderBlock(config).apply(variables, x, mutable=["intermediates"])
    sown = state["intermediates"]
    # sow collects a tuple with one element per call of the layer.
    return x, {group[0]: get_layer(sown, group[0])["inputs"][0] for group in LINEAR_GROUPS}


@functools.partial(jax.jit, static_argnames="config")
def head_logits(config: ModelConfig, outer: Params, x: jax.Array) -> jax.Array:
    """Final norm and output projection: x (batch, time, hidden) -> float32 (batch, time, vocab)."""
    return Decoder(config).apply({"params": outer}, x, method="head")


def get_layer(block: Params, name: str) -> Params:
    """Returns the sub-tree of a block's linear layer, e.g. get_layer(block, "mlp/down_proj").

    Raises:
      ValueError: `name` is not one of LINEAR_LAYERS.
    """
    module, layer = _split(name)
    return block[module][layer]


def with_layer(block: Params, name: str, kernel: Any) -> dict[str, Any]:
    """Returns a copy of a block whose linear layer `name` has another kernel; shares the rest.

    Raises:
      ValueError: `name` is not one of LINEAR_LAYERS.
    """
    module, layer = _split(name)
    replaced = {**block[module][layer], "kernel": kernel}
    return {**block, module: {**block[module], layer: replaced}}


def _split(name: str) -> tuple[str, str]:
    if name not in LINEAR_LAYERS:
        raise ValueError(f"{name!r} is not a linear layer of a block; choose from {LINEAR_LAYERS}")
    module, layer = name.split("/")
    return module, layer
