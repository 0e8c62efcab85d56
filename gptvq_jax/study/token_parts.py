"""The parts of a step of generation, each a program of its own: what it reads, multiplies, takes.

A part runs on the weights of all blocks in turn, each product waiting for the one before, so that
they come from memory as in a step. What a call of a program costs apart from its work is measured
by one with the same arguments that only negates the first. Where a part is not a product, the
products around it are replaced by ones that only give an array of the right shape.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import DecoderBlock, embed, get_layer
from gptvq_jax.ops.coded_rows import CodedRows
from gptvq_jax.ops.int8_head import Int8Head
from gptvq_jax.serve.forward import Caches, next_logits
from gptvq_jax.serve.params import outer_params
from gptvq_jax.serve.sampling import Sampling, sample

_TINY = 1e-30  # of an output is added to the next input, which then has to wait for it


@dataclasses.dataclass(frozen=True)
class Part:
    """What a step does of one kind.

    Fields:
      name: of the kind.
      calls: in a step.
      bytes: of weights and caches that these must read, whatever they are read by.
      multiply_adds: of their products.
      run: does it once for a step; returns arrays to wait for.
      nothing: takes the same arguments, and does as good as nothing: it only negates the first.
      within: whether another part has it in it, measured as the step runs it.
    """

    name: str
    calls: int
    bytes: int
    multiply_adds: int
    run: Callable[[], Any]
    nothing: Callable[[], Any]
    within: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoProduct:
    """Stands for a weight where what is around its product is measured."""

    features: int = dataclasses.field(metadata={"static": True})

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """(..., C) -> (..., features): x again and again."""
        return jnp.tile(x, -(-self.features // x.shape[-1]))[..., : self.features]


def parts(
    config: ModelConfig, params: Any, caches: Caches, position: int, batch: int = 1
) -> list[Part]:
    """Of a step that feeds a token at `position` of each of `batch` sequences to the model.

    Args:
      config: of the model.
      params: its tree, as `serve.params` makes it.
      caches: of the sequences; the part that stores in them takes them for itself.
      position: tokens before the one that is fed.
      batch: sequences.
    """
    dtype, depth = caches[0].k.dtype, config.num_hidden_layers
    blocks = [params[f"layers_{index}"] for index in range(depth)]
    configs = tuple(config.of_block(index) for index in range(depth))
    x = jax.random.normal(jax.random.key(0), (batch, 1, config.hidden_size), dtype)
    made = [
        *_products(configs, blocks, dtype, batch),
        *_experts(configs, blocks, x),
        _attention(configs, blocks, caches, x, position),
        _between(configs, blocks, x),
        *_ends(config, params, x),
    ]
    return made


def _products(
    configs: Sequence[ModelConfig], blocks: Sequence[Any], dtype: Any, batch: int
) -> list[Part]:
    """Of linear layers that every token meets, a part for those that read the same array."""
    grouped: dict[tuple[str, ...], list[list[Any]]] = {}
    for config, block in zip(configs, blocks, strict=True):
        for names in config.linear_groups:
            if "experts" not in names[0]:
                kernels = [get_layer(block, name)["kernel"] for name in names]
                grouped.setdefault(names, []).append(kernels)
    made = []
    for names, groups in grouped.items():
        shapes = [weight_shape(kernel) for kernels in groups for kernel in kernels]
        x = jax.random.normal(jax.random.key(0), (batch, 1, shapes[0][1]), dtype)
        made.append(
            Part(
                " ".join(name.rpartition("/")[2] for name in names),
                len(shapes),
                weight_bytes(groups),
                batch * sum(rows * cols for rows, cols in shapes),
                partial(_multiply, x, groups),
                partial(_pass_on, x, groups),
            )
        )
    return made


def _experts(configs: Sequence[ModelConfig], blocks: Sequence[Any], x: jax.Array) -> list[Part]:
    """Router and experts, of which a token meets some."""
    chosen = [pair for pair in zip(configs, blocks, strict=True) if pair[0].experts]
    if not chosen:
        return []
    size = work = 0
    for config, block in chosen:
        names = config.family.experts
        router = block[names.module][names.router]["kernel"]
        all_experts = weight_bytes(block[names.module]) - weight_bytes(router)
        met = min(config.experts, len(x) * config.experts_per_token)
        size += weight_bytes(router) + all_experts * met // config.experts
        per_expert = 3 * config.hidden_size * config.expert_size
        per_token = config.experts * config.hidden_size + config.experts_per_token * per_expert
        work += len(x) * per_token
    some = tuple(config for config, _ in chosen), [block for _, block in chosen]
    return [
        Part(
            "experts",
            len(chosen),
            size,
            work,
            partial(_feed, *some, x),
            partial(_pass_on, x, some[1]),
        )
    ]


def _attention(configs, blocks, caches: Caches, x: jax.Array, position: int) -> Part:
    """Rotation, norms of heads, storing of keys and values, scores and sums: what is between the
    products of attention."""
    size = work = 0
    for config, cache in zip(configs, caches, strict=True):
        window = config.sliding_window
        seen = position + 1 if window is None else min(position + 1, window)
        width = config.num_key_value_heads * config.head_dim
        size += len(x) * 2 * seen * width * cache.k.dtype.itemsize
        work += len(x) * 2 * seen * config.num_attention_heads * config.head_dim
    positions = jnp.full((len(x), 1), position, jnp.int32)
    free = [_free(config, block) for config, block in zip(configs, blocks, strict=True)]
    calls = on_caches(_mix, configs, free, caches, x, positions)
    return Part("attention with cache", len(blocks), size, work, *calls)


def on_caches(program, configs, free, caches: Caches, x: jax.Array, positions: jax.Array):
    """`run` and `nothing` of a program that takes and returns caches, which each keeps for itself.

    Args:
      program: donates caches; of all arguments that follow, (y, caches).
      configs: of blocks.
      free: their parameters.
      caches: copied.
      x: (batch, 1, hidden).
      positions: (batch, 1).
    """
    held = {"run": jax.tree.map(jnp.copy, caches), "nothing": jax.tree.map(jnp.copy, caches)}

    def call(kind: str, program: Callable[..., Any]) -> jax.Array:
        y, held[kind] = program(configs, free, held[kind], x, positions)
        return y

    return partial(call, "run", program), partial(call, "nothing", _pass_on_caches)


def _between(configs, blocks, x: jax.Array) -> Part:
    """Norms, activation and sums of a block."""
    free = [_free(config, block) for config, block in zip(configs, blocks, strict=True)]
    size = 0
    for config, block in zip(configs, blocks, strict=True):
        names = [name for name in config.family.norms if name is not None]
        size += sum(weight_bytes(block[name]) for name in names)
    run, nothing = partial(_rest, configs, free, x), partial(_pass_on, x, free)
    return Part("norms, activation, sums", len(blocks), size, 0, run, nothing)


def _ends(config: ModelConfig, params: Any, x: jax.Array) -> list[Part]:
    """What comes before the first block and after the last."""
    batch, hidden, vocab = len(x), config.hidden_size, config.vocab_size
    outer, table = outer_params(params), params["embed_tokens"]["embedding"]
    looked_up = _looked_up(table)
    head = _multiplied(table if config.tie_word_embeddings else params["lm_head"]["kernel"])
    tokens = jnp.arange(batch, dtype=jnp.int32)[:, None] % vocab
    logits = jax.random.normal(jax.random.key(1), (batch, vocab), jnp.float32)
    key = jax.random.key(2)
    return [
        Part(
            "embedding",
            1,
            batch * weight_bytes(looked_up) // vocab,
            0,
            partial(_embed, config, outer, tokens),
            partial(_pass_on, tokens, outer),
        ),
        Part(
            "head, with its norm",
            1,
            weight_bytes(head) + weight_bytes(outer["norm"]),
            batch * vocab * hidden,
            partial(_head, config, outer, x),
            partial(_pass_on, x, outer),
        ),
        Part(
            "sampling",
            1,
            logits.nbytes,
            0,
            partial(_sample, logits, key),
            partial(_pass_on, logits[:1, :1], key),
        ),
    ]


def _looked_up(table: Any) -> Any:
    """What of an embedding tokens are looked up in."""
    if isinstance(table, Int8Head):
        return table.coded if table.rows is None else table.rows
    return table.tensor if isinstance(table, CodedRows) else table


def _multiplied(head: Any) -> Any:
    """What of a head its product reads."""
    if isinstance(head, Int8Head):
        return head.coded
    return head.kernel if isinstance(head, CodedRows) else head


def weight_bytes(tree: Any) -> int:
    """Of the arrays of a weight, as they are held."""
    return sum(array.nbytes for array in jax.tree.leaves(tree))


def weight_shape(kernel: Any) -> tuple[int, int]:
    """(outputs, inputs) of the weight of a linear layer."""
    if hasattr(kernel, "values"):  # by rows
        return kernel.values.shape
    cols, rows = kernel.shape
    return rows, cols


def _free(config: ModelConfig, block: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a block without its products; experts are left out."""
    names = config.family.experts
    kept = {k: v for k, v in block.items() if not (config.experts and k == names.module)}
    flat = flatten_dict(kept)
    for path, leaf in flat.items():
        if path[-1] == "kernel":
            flat[path] = NoProduct(weight_shape(leaf)[0])
    return unflatten_dict(flat)


# --- the programs ---


@jax.jit
def _multiply(x: jax.Array, groups: list[list[Any]]) -> jax.Array:
    # Products of one array may go side by side, as they may within a step.
    for kernels in groups:
        x = _after(x, *[x @ kernel for kernel in kernels])
    return x


@partial(jax.jit, keep_unused=True)
def _pass_on(x: jax.Array, _: Any) -> jax.Array:
    return -x


@partial(jax.jit, static_argnames="configs")
def _feed(configs, blocks: list[Any], x: jax.Array) -> jax.Array:
    for config, block in zip(configs, blocks, strict=True):
        x = _after(x, DecoderBlock(config).apply({"params": block}, x, method=_feed_forward))
    return x


@partial(jax.jit, static_argnames="configs", donate_argnames="caches")
def _mix(configs, blocks: list[Any], caches: Caches, x: jax.Array, positions: jax.Array):
    updated = []
    for config, block, cache in zip(configs, blocks, caches, strict=True):
        mixed, cache = DecoderBlock(config).apply(
            {"params": block}, x, cache, positions, method=_attention_alone
        )
        x = _after(x, mixed)
        updated.append(cache)
    return x, tuple(updated)


@partial(jax.jit, static_argnames="configs", donate_argnames="caches", keep_unused=True)
def _pass_on_caches(configs, blocks: list[Any], caches: Caches, x: jax.Array, positions: jax.Array):
    return -x, caches


@partial(jax.jit, static_argnames="configs")
def _rest(configs, blocks: list[Any], x: jax.Array) -> jax.Array:
    for config, block in zip(configs, blocks, strict=True):
        x = DecoderBlock(config).apply({"params": block}, x, method=_all_but_products)
    return x


@partial(jax.jit, static_argnames="config")
def _embed(config: ModelConfig, outer: Any, tokens: jax.Array) -> jax.Array:
    return embed(config, outer, tokens)


@partial(jax.jit, static_argnames="config")
def _head(config: ModelConfig, outer: Any, x: jax.Array) -> jax.Array:
    return next_logits(config, outer, x)


@jax.jit
def _sample(logits: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    key, now = jax.random.split(key)
    return sample(logits, now, Sampling()), key


def _after(x: jax.Array, *outputs: jax.Array) -> jax.Array:
    return x + (sum(y[..., :1] for y in outputs) * _TINY).astype(x.dtype)


def _feed_forward(block: DecoderBlock, x: jax.Array) -> jax.Array:
    return block.feed(x, block.gate(x))


def _attention_alone(block: DecoderBlock, x: jax.Array, cache, positions: jax.Array):
    return block.self_attn.mix(x, cache, positions)


def _all_but_products(block: DecoderBlock, x: jax.Array) -> jax.Array:
    config = block.config
    width = NoProduct(config.num_attention_heads * config.head_dim)
    x = block.attend(x, block._norm("before_attention", x) @ width)
    return x if config.experts else _feed_forward(block, x)
