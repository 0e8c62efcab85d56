"""The loss of a model with adapters, and its gradient with respect to them alone.

The weights stay as they are, packed. A block is decoded, run and forgotten: once on the way up,
which keeps what each block reads, and once on the way down, where it is run again for its backward
pass. Memory holds one dense block, whatever the depth. A dense product of many tokens is faster
than a packed one (run/evaluate.py has figures), and the gradient needs x W as well as x W^T.

Costs, for P weights in the blocks, a vocabulary of V x H, and N tokens: 2 P N forward, 2 P N again
and 2 P N for the gradient of the activations; gradients of weights are never formed. 4 V H N for
the head. The adapters, r (R + C) of R C each, are small beside that. P weights are decoded twice.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.lora.leaf import Leaf, with_adapters
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.head_chunk import head_chunk
from gptvq_jax.models.llama import DecoderBlock, Params
from gptvq_jax.models.source import ModelSource
from gptvq_jax.run.embedding import head_on_device, rows_of
from gptvq_jax.run.token_losses import token_nll

Adapters = dict[str, Leaf]  # by layer, "layers_3/self_attn/q_proj"


class FrozenModel:
    """A model whose weights nobody changes, on the device.

    Args:
      source: a PackedCheckpoint, whose blocks stay packed, or any other model.
      scale: of all adapters.
    """

    def __init__(self, source: ModelSource, scale: float):
        self.config = source.config
        self._scale = jnp.float32(scale)
        packed = getattr(source, "packed_block", source.block)
        depth = range(self.config.num_hidden_layers)
        self._blocks = [_on_device(packed(index)) for index in depth]
        self._outer = source.outer()
        self._head = head_on_device(self.config, self._outer)

    def loss_and_gradient(
        self, adapters: Adapters, tokens: np.ndarray, learned: np.ndarray, key: Any, rate: float
    ) -> tuple[jax.Array, Adapters]:
        """The mean negative log-likelihood of the tokens that are learned, in nats.

        Args:
          adapters: by layer.
          tokens: (batch, T) int32.
          learned: (batch, T - 1) bool, at least one of them True.
          key: of the dropout.
          rate: of the dropout.
        """
        by_block = self._by_block(adapters)
        lowest = min(index for index, of_block in enumerate(by_block) if of_block)
        x, inputs = self._embedded(tokens), []
        for index, of_block in enumerate(by_block):
            inputs.append(x if index >= lowest else None)
            x = self._run(index, of_block, x, jax.random.fold_in(key, index), rate)
        weights = learned.astype(np.float32) / learned.sum()
        loss, dy = _head_gradient(self.config, self._head, x, tokens, weights)
        gradient: Adapters = {}
        for index in range(len(by_block) - 1, lowest - 1, -1):
            config, block = self.config.of_block(index), self._decoded(index)
            of_key = jax.random.fold_in(key, index)
            arguments = block, by_block[index], self._scale, inputs.pop(), dy, of_key
            of_block, dy = _block_backward(config, rate, *arguments)
            gradient |= {f"layers_{index}/{name}": leaf for name, leaf in of_block.items()}
        return loss, gradient

    def loss(self, adapters: Adapters, tokens: np.ndarray, learned: np.ndarray) -> float:
        """The sum of the negative log-likelihoods of what is learned, without dropout."""
        x, key = self._embedded(tokens), jax.random.key(0)
        for index, of_block in enumerate(self._by_block(adapters)):
            x = self._run(index, of_block, x, key, 0.0)
        losses = np.asarray(token_nll(self.config, self._head, x, tokens), np.float64)
        return float(losses[learned].sum())

    def _run(self, index: int, adapters: Mapping[str, Leaf], x, key, rate: float) -> jax.Array:
        config = self.config.of_block(index)
        return _block_forward(config, rate, self._decoded(index), adapters, self._scale, x, key)

    def _embedded(self, tokens: np.ndarray) -> jax.Array:
        return jnp.asarray(rows_of(self.config, self._outer, tokens), jnp.float32)

    def _decoded(self, index: int) -> Params:
        return jax.tree.map(_dense, self._blocks[index], is_leaf=_is_packed)

    def _by_block(self, adapters: Adapters) -> list[dict[str, Leaf]]:
        by_block: list[dict[str, Leaf]] = [{} for _ in self._blocks]
        for name, leaf in adapters.items():
            block, _, within = name.partition("/")
            by_block[int(block.removeprefix("layers_"))][within] = leaf
        return by_block


def _on_device(block: Params) -> Params:
    """Packed tensors as they are decoded with few programs, all else in float32."""

    def put(leaf):
        if _is_packed(leaf):
            return jax.device_put(leaf.for_compilation())
        return jnp.asarray(leaf, jnp.float32)

    return jax.tree.map(put, block, is_leaf=_is_packed)


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedTensor)


def _dense(leaf: Any) -> jax.Array:
    return _decode(leaf) if _is_packed(leaf) else leaf


_decode = jax.jit(lambda tensor: tensor.dequantize().T)


@partial(jax.jit, static_argnames=("config", "rate"))
def _block_forward(
    config: ModelConfig,
    rate: float,
    block: Params,
    adapters: Mapping[str, Leaf],
    scale: jax.Array,
    x: jax.Array,
    key: jax.Array,
) -> jax.Array:
    params = with_adapters(block, adapters, scale, key, rate)
    return DecoderBlock(config).apply({"params": params}, x)


@partial(jax.jit, static_argnames=("config", "rate"))
def _block_backward(
    config: ModelConfig,
    rate: float,
    block: Params,
    adapters: Mapping[str, Leaf],
    scale: jax.Array,
    x: jax.Array,
    dy: jax.Array,
    key: jax.Array,
) -> tuple[dict[str, Leaf], jax.Array]:
    """Gradients of the adapters of a block and of its inputs, from that of its outputs."""

    def run(adapters, x):
        params = with_adapters(block, adapters, scale, key, rate)
        return DecoderBlock(config).apply({"params": params}, x)

    return jax.vjp(run, adapters, x)[1](dy)


@partial(jax.jit, static_argnames="config")
def _head_gradient(
    config: ModelConfig, head: Params, x: jax.Array, tokens: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the losses of tokens 2..T, and its gradient with respect to x.

    A chunk of tokens goes forward and backward before the next one: logits of all would not fit.

    Args:
      config: of the model.
      head: its final norm and head.
      x: outputs of the last block (batch, T, hidden).
      tokens: (batch, T).
      weights: (batch, T - 1) of the losses.
    """
    time, size = x.shape[1], head_chunk(config, len(x), tables=2)
    pad = -(time - 1) % size
    padded = [jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2)) for a in (x, tokens)]
    of_losses = jnp.pad(weights, ((0, 0), (0, pad)))

    def chunk(start):
        # The last token of a chunk is only a target, and the first token of the next one.
        part, targets = (lax.dynamic_slice_in_dim(a, start, size + 1, axis=1) for a in padded)
        weight = lax.dynamic_slice_in_dim(of_losses, start, size, axis=1)

        def loss(part):
            return jnp.sum(weight * token_nll(config, head, part, targets))

        value, dx = jax.value_and_grad(loss)(part)
        return value, dx[:, :-1]

    values, dx = lax.map(chunk, jnp.arange(0, time - 1, size))
    dx = jnp.moveaxis(dx, 0, 1).reshape(x.shape[0], -1, x.shape[2])[:, : time - 1]
    return jnp.sum(values), jnp.pad(dx, ((0, 0), (0, 1), (0, 0)))
