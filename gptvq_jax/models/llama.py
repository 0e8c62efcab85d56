"""The decoder of all families (models/families) in Flax Linen, whole or one block at a time.

The parameters are plain nested dicts, named as in Hugging Face's checkpoints; kernels are (in, out)
as everywhere in Flax:

    {"embed_tokens": {"embedding"}, "layers_0": BLOCK, ..., "norm": {"scale"},
     "lm_head": {"kernel"}}                                    # no lm_head when embeddings are tied
    BLOCK = {"input_layernorm": {"scale"},
             "self_attn": {"q_proj": {"kernel"}, "k_proj": .., "v_proj": .., "o_proj": ..},
             "post_attention_layernorm": {"scale"},
             "mlp": {"gate_proj": {"kernel"}, "up_proj": .., "down_proj": ..}}

Those are Llama's; a family may have other norms (`Family.norms`, under their own names), "q_norm"
and "k_norm" in "self_attn", and a "bias" beside a kernel. In place of "mlp" a block with experts
has what `Family.experts` names (experts.py):

    {"gate": {"kernel"}, "experts_0": {"w1": {"kernel"}, "w3": .., "w2": ..}, "experts_1": ..}

`outer` below is this tree without its layers_i. Computation runs in the dtype of the activations;
norm statistics, rotary tables, softmax and logits are float32. Float32 activations are multiplied
as float32 on every kind of device (`layers.precision`).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from gptvq_jax.models.attention import Attention
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.experts import Experts, Routed, Routes
from gptvq_jax.models.kv_cache import LayerCache
from gptvq_jax.models.layers import (
    ACTIVATIONS,
    Embedding,
    Linear,
    RMSNorm,
    look_up,
    precision,
    soft_cap,
)
from gptvq_jax.models.stages import EXPERT_STAGES, STAGES

Params = Mapping[str, Any]


class MLP(nn.Module):
    """The gated feed-forward layer down(act(gate(x)) * up(x)), (..., hidden) -> same."""

    config: ModelConfig

    def setup(self):
        bias = self.config.mlp_bias
        self.gate_proj = Linear(self.config.intermediate_size, use_bias=bias)
        self.up_proj = Linear(self.config.intermediate_size, use_bias=bias)
        self.down_proj = Linear(self.config.hidden_size, use_bias=bias)

    def gated(self, x: jax.Array) -> jax.Array:
        """What down_proj reads (..., intermediate)."""
        return ACTIVATIONS[self.config.hidden_act](self.gate_proj(x)) * self.up_proj(x)


class DecoderBlock(nn.Module):
    """One transformer block, (batch, time, hidden) -> same.

    Without a cache, x is at positions 0..time-1 and sees nothing else. With one, its keys and
    values are stored there, and the result is (x, cache). Then `positions` (batch, time) says
    where x is in its sequences, of which it sees what the cache holds; None: 0..time-1, as above.

    It has four stages, each with the linear layers that read one array: `mix`, `attend`, `gate`,
    `feed`. Two of them go from x to an inner array, two from both back to x.

    Raises:
      ValueError: `config` is that of a model whose blocks differ; see ModelConfig.of_block.
    """

    config: ModelConfig

    def setup(self):
        config = self.config
        if config.blocks is not None:
            raise ValueError("blocks of this model differ: pass config.of_block(index)")
        for name in filter(None, config.family.norms):
            setattr(self, name, RMSNorm(config.rms_norm_eps, config.family.norm_offset))
        self.self_attn = Attention(config)
        if config.experts:
            setattr(self, config.family.experts.module, Experts(config))
        else:
            self.mlp = MLP(config)

    @property
    def _experts(self) -> Experts:
        return getattr(self, self.config.family.experts.module)

    def _norm(self, where: str, x: jax.Array) -> jax.Array:
        """x after one of `Norms`, if the block has it."""
        name = getattr(self.config.family.norms, where)
        return x if name is None else getattr(self, name)(x)

    def _add(self, x: jax.Array, output: jax.Array) -> jax.Array:
        scale = self.config.residual_scale
        return x + (output if scale == 1 else output * scale)

    def __call__(
        self, x: jax.Array, cache: LayerCache | None = None, positions: jax.Array | None = None
    ) -> Any:
        mixed = self.mix(x, cache, positions)
        if cache is not None:
            mixed, cache = mixed
        x = self.attend(x, mixed)
        x = self.feed(x, self.gate(x))
        return x if cache is None else (x, cache)

    def mix(
        self, x: jax.Array, cache: LayerCache | None = None, positions: jax.Array | None = None
    ) -> Any:
        """Stage 0: what o_proj reads; with a cache, also the cache."""
        return self.self_attn.mix(self._norm("before_attention", x), cache, positions)

    def attend(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        """Stage 1: x after attention."""
        return self._add(x, self._norm("after_attention", self.self_attn.o_proj(mixed)))

    def gate(self, x: jax.Array, routes: Routes | None = None) -> jax.Array:
        """Stage 2: what down_proj reads; `routes` are by default those of x."""
        x = self._norm("before_feed", x)
        return self._experts.gated(x, routes) if self.config.experts else self.mlp.gated(x)

    def feed(self, x: jax.Array, gated: jax.Array) -> jax.Array:
        """Stage 3: x after the block."""
        if self.config.experts:
            output = self._experts.output(self._norm("before_feed", x), gated)
        else:
            output = self.mlp.down_proj(gated)
        return self._add(x, self._norm("after_feed", output))


class Decoder(nn.Module):
    """The whole model, tokens (batch, time) int -> logits (batch, time, vocab) float32."""

    config: ModelConfig

    def setup(self):
        config = self.config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderBlock(config.of_block(i)) for i in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.rms_norm_eps, config.family.norm_offset)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.vocab_size, out_dtype=jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = scale_embeddings(self.config, self.embed_tokens(tokens))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def head(self, x: jax.Array) -> jax.Array:
        """Final norm and output projection, (batch, time, hidden) -> float32 logits."""
        config, x = self.config, self.norm(x)
        logits = self.embed_tokens.attend(x) if config.tie_word_embeddings else self.lm_head(x)
        if config.logit_divisor != 1:
            logits = logits / config.logit_divisor
        return soft_cap(logits, config.logit_softcap)


def scale_embeddings(config: ModelConfig, vectors: Any) -> Any:
    """Rows of the table as block 0 reads them; arrays of NumPy or JAX, in their dtype."""
    if config.embedding_scale == 1:
        return vectors
    return vectors * vectors.dtype.type(config.embedding_scale)


def embed(config: ModelConfig, outer: Params, tokens: jax.Array) -> jax.Array:
    """Looks tokens (batch, time) up, giving (batch, time, hidden) in the embedding's dtype.

    A token outside the vocabulary gives NaN, not another token's vector.
    """
    return scale_embeddings(config, look_up(outer["embed_tokens"]["embedding"], tokens))


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


def run_stage(
    config: ModelConfig, block_params: Params, stage: int, x: jax.Array, inner: jax.Array | None
) -> tuple[jax.Array, jax.Array | None, jax.Array | Routed]:
    """Runs one of STAGES.

    Args:
      config: of the model.
      block_params: of the block; only the layers of this stage are used.
      stage: 0 to 3.
      x: (batch, time, hidden), the block's as far as it has come.
      inner: what the stage before this one opened (batch, time, width), or None.

    Returns:
      x and inner after the stage, and what its linear layers read (batch, time, in).
    """
    arguments = (x,) if inner is None else (x, inner)
    result, state = DecoderBlock(config).apply(
        {"params": block_params}, *arguments, method=STAGES[stage], mutable=["intermediates"]
    )
    read = stage_inputs(config, state["intermediates"], stage)
    return (x, result, read) if inner is None else (result, None, read)


def stage_inputs(config: ModelConfig, intermediates: Params, stage: int) -> jax.Array | Routed:
    """What the linear layers of a stage read, as a block that ran has sown it."""
    # sow collects a tuple with one element per call of the layer.
    if stage in EXPERT_STAGES and config.experts:
        sown = intermediates[config.family.experts.module]
        return Routed(sown[f"{STAGES[stage]}_inputs"][0], sown["routes"][0])
    return get_layer(intermediates, config.layers.stages[stage][0][0])["inputs"][0]


def routed_inputs(
    config: ModelConfig, block_params: Params, stage: int, x: jax.Array, routes: Routes
) -> jax.Array:
    """What a stage of experts would read if the tokens of x went these ways.

    Args:
      config: of the block.
      block_params: of the block.
      stage: 2 or 3.
      x: (batch, time, hidden), after attention.
      routes: of x, or of the same tokens elsewhere.

    Returns:
      As `Routed.inputs`.
    """
    block = DecoderBlock(config)
    gated, state = block.apply(
        {"params": block_params}, x, routes, method="gate", mutable=["intermediates"]
    )
    if stage == 2:
        return stage_inputs(config, state["intermediates"], stage).inputs
    return gated.reshape(*routes.experts.shape, config.expert_size)


def closing_outputs(
    config: ModelConfig,
    block_params: Params,
    stage: int,
    before: jax.Array,
    after: jax.Array,
    float_block: Params | None = None,
) -> jax.Array:
    """What the layer of stage 1 or 3 computed, its bias apart, in a block that took x from `before`
    to `after`.

    Args:
      config: of the block.
      block_params: of the block, for the bias.
      stage: 1 or 3.
      before: x (batch, time, hidden) at the entrance of stage `stage` - 1.
      after: x at the exit of stage `stage`.
      float_block: parameters of the block that did it; needed where the family has a norm behind
        the layer, which is then run again.
    """
    ((name,),) = config.layers.stages[stage]
    if config.family.norms[stage] is None:
        outputs = after.astype(jnp.float32) - before.astype(jnp.float32)
        if config.residual_scale != 1:
            outputs = outputs / config.residual_scale
        bias = get_layer(block_params, name).get("bias")
        return outputs if bias is None else outputs - bias
    _, inner, _ = run_stage(config, float_block, stage - 1, before, None)
    kernel = get_layer(float_block, name)["kernel"]
    return jnp.matmul(inner, kernel, precision=precision(inner.dtype))


@functools.partial(jax.jit, static_argnames="config")
def block_forward_with_inputs(
    config: ModelConfig, block_params: Params, x: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs one block and also returns what its linear layers read.

    Returns:
      The next block's x, and {first name of the group: inputs (batch, time, in)} with one entry
      per group of `config.linear_groups`, whose layers all read that same array. Iterate these for
      the order of evaluation: jit sorts the keys of a dict. Experts have one `Routed` for all of
      them, under the name of the first.
    """
    inner, reads = None, {}
    for stage, groups in enumerate(config.layers.stages):
        x, inner, reads[groups[0][0]] = run_stage(config, block_params, stage, x, inner)
    return x, reads


@functools.partial(jax.jit, static_argnames="config")
def head_logits(config: ModelConfig, outer: Params, x: jax.Array) -> jax.Array:
    """Final norm and output projection: x (batch, time, hidden) -> float32 (batch, time, vocab)."""
    return Decoder(config).apply({"params": outer}, x, method="head")


def get_layer(block: Params, name: str) -> Params:
    """Returns the sub-tree of a block's linear layer, e.g. get_layer(block, "mlp/down_proj").

    Raises:
      ValueError: the block has no such layer.
    """
    found: Any = block
    for part in name.split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    if not _is_layer(found):
        raise _not_a_layer(block, name)
    return found


def _is_layer(tree: Any) -> bool:
    """Of parameters or of what is sown, whatever a kernel is; one that holds others is none."""
    if not isinstance(tree, Mapping):
        return False
    return "kernel" in tree or not any(isinstance(value, Mapping) for value in tree.values())


def with_layer(block: Params, name: str, kernel: Any) -> dict[str, Any]:
    """Returns a copy of a block whose linear layer `name` has another kernel; shares the rest.

    Raises:
      ValueError: the block has no such layer.
    """
    get_layer(block, name)
    return _with_kernel(block, name.split("/"), kernel)


def _with_kernel(tree: Params, path: Sequence[str], kernel: Any) -> dict[str, Any]:
    if not path:
        return {**tree, "kernel": kernel}
    return {**tree, path[0]: _with_kernel(tree[path[0]], path[1:], kernel)}


def _not_a_layer(block: Params, name: str) -> ValueError:
    flat = flatten_dict(block, sep="/")
    layers = [path.rpartition("/")[0] for path in flat if path.endswith("/kernel")]
    return ValueError(f"{name!r} is not a linear layer of a block; choose from {layers}")
