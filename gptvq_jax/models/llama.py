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
norm statistics, rotary tables, softmax and logits are float32.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.models.config import ModelConfig
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


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, with the statistics in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        return (x32 * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype) * scale.astype(x.dtype)


class Linear(nn.Module):
    """Bias-free dense layer, (..., in) -> (..., features), which sows its input as "inputs".

    Its kernel is an array (in, features), or any pytree that implements `x @ kernel` through
    `__rmatmul__`: a quantized layer replaces a dense one by replacing this leaf.
    Sowing is free unless the collection "intermediates" is mutable. A variable "outputs" in the
    collection "perturbations", in the shape of the outputs, is added to them: the gradient with
    respect to it, at 0, is the gradient with respect to the outputs.

    Raises:
      ValueError: the kernel is an array of another shape.
    """

    features: int
    out_dtype: Any = None  # None: the dtype of x

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        self.sow("intermediates", "inputs", x)
        if self.has_variable("params", "kernel"):
            # Not self.param, which insists on the shape of a dense kernel.
            kernel = self.get_variable("params", "kernel")
        else:
            shape = (x.shape[-1], self.features)
            kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        y = self._matmul(x, kernel)
        # Not self.perturb, with which init would return a collection of zeros.
        if self.has_variable("perturbations", "outputs"):
            y = y + self.get_variable("perturbations", "outputs")
        return y

    def _matmul(self, x: jax.Array, kernel: Any) -> jax.Array:
        out_dtype = x.dtype if self.out_dtype is None else self.out_dtype
        if isinstance(kernel, (jax.Array, np.ndarray)):
            if kernel.shape != (x.shape[-1], self.features):
                raise ValueError(
                    f"kernel of {self.name} has shape {kernel.shape}, but (in, out) must be "
                    f"{(x.shape[-1], self.features)}"
                )
            return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=out_dtype)
        return (x @ kernel).astype(out_dtype)


class Attention(nn.Module):
    """Causal grouped-query self-attention with rotary positions, (batch, time, hidden) -> same."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        batch, time, hidden = x.shape
        head_dim, kv_heads = config.head_dim, config.num_key_value_heads

        def heads(name: str, count: int) -> jax.Array:
            projected = Linear(count * head_dim, name=name)(x)
            return projected.reshape(batch, time, count, head_dim)

        q = heads("q_proj", config.num_attention_heads)
        k = heads("k_proj", kv_heads)
        v = heads("v_proj", kv_heads)
        cos, sin = rotary_tables(config, time)
        mixed = causal_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, config.sliding_window)
        return Linear(hidden, name="o_proj")(mixed.reshape(batch, time, -1))


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
        chunks.append(
            jax.nn.dot_product_attention(
                q[:, start:stop], k[:, first:stop], v[:, first:stop], mask=seen[None, None]
            )
        )
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
    """One transformer block at positions 0..time-1, (batch, time, hidden) -> same."""

    config: ModelConfig

    def setup(self):
        self.input_layernorm = RMSNorm(self.config.rms_norm_eps)
        self.self_attn = Attention(self.config)
        self.post_attention_layernorm = RMSNorm(self.config.rms_norm_eps)
        self.mlp = MLP(self.config)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The whole model, tokens (batch, time) int -> logits (batch, time, vocab) float32."""

    config: ModelConfig

    def setup(self):
        config = self.config
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size)
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
        embedding = self.embed_tokens.embedding.astype(x.dtype)
        return jnp.einsum("bth,vh->btv", x, embedding, preferred_element_type=jnp.float32)


def embed(outer: Params, tokens: jax.Array) -> jax.Array:
    """Looks tokens (batch, time) up, giving (batch, time, hidden) in the embedding's dtype.

    A token outside the vocabulary gives NaN, not another token's vector.
    """
    return jnp.take(outer["embed_tokens"]["embedding"], tokens, axis=0)


@functools.partial(jax.jit, static_argnames="config")
def block_forward(config: ModelConfig, block_params: Params, x: jax.Array) -> jax.Array:
    """Runs one block on activations x (batch, time, hidden), giving the next block's x."""
    return DecoderBlock(config).apply({"params": block_params}, x)


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
