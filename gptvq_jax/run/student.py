"""A packed model whose continuous leaves are tuned: its loss, and gradients of all of them.

The codes of all blocks are in memory, cut out once, a byte or two for each. A block is decoded, the
windows of a step go through it, a micro-batch after the other, and it is forgotten; once more on
the way back. What lies between two blocks is kept meanwhile: no more of what a block computes is
(rematerialization). Gradients with respect to a block's weights, summed over the micro-batches,
become those of its parameters before the next block is decoded.

Costs, for P weights in all blocks, N tokens in a step, and D weights a code:
  flops: models/flops.model_tuning: 2 P N forward, again, and 4 P N backward; two heads forward
    and one back. Two decodings, P / D lookups each, and P / D additions are small beside them.
  memory: codes; two blocks as weights, two as gradients; the inputs of all blocks, depth * N *
    hidden * 4 bytes; what one block keeps for the backward pass of a micro-batch; both heads.
With several devices a micro-batch is spread over them (data-parallel), and all else is on each.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.core.mesh import AXIS, own_mesh
from gptvq_jax.methods import leaf_steps
from gptvq_jax.methods.leaf_steps import LeafState, Rates
from gptvq_jax.methods.trainable import Parameters, Unpacked, unpack
from gptvq_jax.models import flops
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import DecoderBlock, Params
from gptvq_jax.run.calibrate import batches
from gptvq_jax.run.embedding import head_on_device, rows_of
from gptvq_jax.run.finetune import as_block, split
from gptvq_jax.run.model_loss import divergence
from gptvq_jax.storage.checkpoint import PackedCheckpoint

LAST_NORM = "norm/scale"
States = dict[str, LeafState]  # by the path of the leaf: "layers_0/mlp/up_proj/kernel"
Gradients = dict[str, Parameters]


class Teacher(NamedTuple):
    """The float model as far as the loss needs it."""

    config: ModelConfig
    head: Params  # on the device


class OfBlock(NamedTuple):
    """What a pass through the model and back leaves at a block."""

    index: int
    config: ModelConfig
    params: Params  # dense, as it is stored
    inputs: list[jax.Array]  # of each micro-batch (batch, T, hidden)
    of_weights: dict[str, jax.Array]  # gradients: of norms, and of weights (R, C)


class Student:
    """See above; what changes is in `States`, which it does not hold.

    Args:
      checkpoint: of the model.
      teacher: the float model.
      micro_batch: windows at once; of the devices here, as many are used as divide it evenly.
      stopwatch: receives the operations.
    """

    def __init__(
        self, checkpoint: PackedCheckpoint, teacher: Teacher, micro_batch: int, stopwatch: Stopwatch
    ):
        self.config, self._stopwatch = checkpoint.config, stopwatch
        self._micro_batch = micro_batch
        devices = own_mesh().devices.flat
        mesh = Mesh(devices[: math.gcd(len(devices), micro_batch)], (AXIS,))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._spread = NamedSharding(mesh, PartitionSpec(AXIS))
        self._outer = checkpoint.outer()
        self._head = self._on_all(head_on_device(self.config, self._outer))
        self._teacher = Teacher(teacher.config, self._on_all(teacher.head))
        self.leaves: dict[str, Unpacked] = {}
        self._fixed: list[dict[str, jax.Array]] = []
        self._names: list[list[str]] = []
        for index in range(self.config.num_hidden_layers):
            leaves, fixed = split(checkpoint.packed_block(index))
            self._names.append(list(leaves))
            self._fixed.append(self._on_all(fixed))
            for name, leaf in leaves.items():
                self.leaves[f"layers_{index}/{name}"] = self._on_all(unpack(leaf))
        scale = checkpoint.packed_outer()["norm"]["scale"]
        self.leaves[LAST_NORM] = self._on_all(unpack(scale))

    def _on_all(self, tree):
        return jax.device_put(tree, self._everywhere)

    def states(self) -> States:
        """Of the leaves as they are stored."""
        return {name: leaf_steps.start(leaf) for name, leaf in self.leaves.items()}

    def placed(self, states: States) -> States:
        """States of host arrays, on the devices."""
        return self._on_all(states)

    def coded(self, path: str, states: States) -> Unpacked:
        """A leaf with the codes of its state."""
        return leaf_steps.coded(self.leaves[path], states[path])

    def gradients(
        self, states: States, tokens: np.ndarray, reference: np.ndarray
    ) -> tuple[np.ndarray, Gradients]:
        """Of the windows of a step.

        Args:
          states: of the leaves.
          tokens: (windows, T), whole micro-batches.
          reference: what the float model's last block leaves (windows, T, hidden).

        Returns:
          The mean KL divergence over the tokens of each window (windows,), in nats; and gradients
          of their mean.
        """
        divergences, of_norm, blocks = self.there_and_back(states, tokens, reference)
        found = {LAST_NORM: self._pull_back(LAST_NORM, states, of_norm)}
        for block in blocks:
            for name, gradient in block.of_weights.items():
                path = f"layers_{block.index}/{name}"
                found[path] = self._pull_back(path, states, gradient)
        return divergences, found

    def there_and_back(
        self, states: States, tokens: np.ndarray, reference: np.ndarray
    ) -> tuple[np.ndarray, jax.Array, Iterator[OfBlock]]:
        """The same with respect to the weights themselves, a block at a time.

        Args are those of `gradients`.

        Returns:
          The divergences; the gradient of the last norm's scale; and of every block, from the last
          one to the first, which is gone when the next one is asked for.
        """
        xs, entrances = self._embedded(tokens), []
        for index in range(len(self._fixed)):
            entrances.append(xs)
            xs = self._through(index, states, xs)
        factor, sums, dxs, of_norm = 1 / tokens.size, [], [], None
        for x, part in zip(xs, self._parts(tokens), strict=True):
            kl, dx, of_scale = self._divergence(states, x, reference[part])
            sums.append(kl)
            dxs.append(dx * factor)
            of_norm = of_scale if of_norm is None else of_norm + of_scale
            batch = tokens[part].shape
            self._stopwatch.flops(flops.model_tuning(self.config, *batch))
        blocks = self._back(states, entrances, dxs)
        return np.concatenate(sums) / tokens.shape[1], of_norm * factor, blocks

    def _back(
        self, states: States, entrances: list[list[jax.Array]], dxs: list[jax.Array]
    ) -> Iterator[OfBlock]:
        for index in reversed(range(len(self._fixed))):
            config, weights, fixed = self._decoded(index, states)
            inputs, total = entrances.pop(), None
            for number, x in enumerate(inputs):
                of_weights, dxs[number] = _backward(
                    config, weights, fixed, x, dxs[number], self._everywhere
                )
                total = of_weights if total is None else _added(total, of_weights)
            yield OfBlock(index, config, as_block(weights, fixed), inputs, total)

    def divergences(self, states: States, tokens: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """The mean KL divergence over the tokens of each window (windows,), in nats.

        Args are those of `gradients`, but for micro-batches, which may be smaller.
        """
        xs = self._embedded(tokens)
        for index in range(len(self._fixed)):
            xs = self._through(index, states, xs)
        found = []
        for x, part in zip(xs, self._parts(tokens), strict=True):
            kl, _, _ = self._divergence(states, x, reference[part])
            found.append(kl)
            shape = tokens[part].shape
            forward = flops.blocks_forward(self.config, *shape)
            self._stopwatch.flops(forward + flops.divergence(self.config, *shape))
        return np.concatenate(found) / tokens.shape[1]

    def update(
        self, states: States, gradients: Gradients, rates: Rates
    ) -> tuple[States, Iterator[jax.Array]]:
        """A step of AdamW on every leaf; and, of each, whether all of it is finite."""
        updated = {
            name: leaf_steps.update(leaf, states[name], gradients[name], rates)
            for name, leaf in self.leaves.items()
        }
        return {n: state for n, (state, _) in updated.items()}, (f for _, f in updated.values())

    def stored(self, tree: Params, states: States, prefix: str) -> Params:
        """A tree of the checkpoint with the parameters of states, in host arrays.

        Args:
          tree: of a block, or of what is outside the blocks, packed.
          states: of the leaves.
          prefix: of its leaves among these: "layers_0/", or "".
        """
        flat = traverse_util.flatten_dict(tree, sep="/")
        for name, leaf in flat.items():
            path = prefix + name
            if path in states:
                stored = leaf_steps.stored(leaf, self.leaves[path], states[path])
                flat[name] = jax.tree.map(np.asarray, stored)
        return traverse_util.unflatten_dict(flat, sep="/")

    def distances(self, states: States) -> dict[str, dict[str, float]]:
        """{leaf: {parameter: what it has moved, relative to its size at the start}}."""
        return {
            name: {p: float(d) for p, d in leaf_steps.distances(leaf, states[name]).items()}
            for name, leaf in self.leaves.items()
        }

    def _parts(self, tokens: np.ndarray) -> Iterator[slice]:
        return batches(len(tokens), self._micro_batch)

    def _embedded(self, tokens: np.ndarray) -> list[jax.Array]:
        """Of each micro-batch."""
        rows = np.asarray(rows_of(self.config, self._outer, tokens), np.float32)
        return [jax.device_put(rows[part], self._spread) for part in self._parts(tokens)]

    def _through(self, index: int, states: States, xs: list[jax.Array]) -> list[jax.Array]:
        config, weights, fixed = self._decoded(index, states)
        return [_forward(config, weights, fixed, x) for x in xs]

    def _decoded(self, index: int, states: States) -> tuple[ModelConfig, Mapping, Mapping]:
        weights = {
            name: self._dense(f"layers_{index}/{name}", states) for name in self._names[index]
        }
        return self.config.of_block(index), weights, self._fixed[index]

    def _dense(self, path: str, states: States) -> jax.Array:
        return leaf_steps.decode(self.leaves[path], states[path])

    def _pull_back(self, path: str, states: States, gradient: jax.Array) -> Parameters:
        return leaf_steps.pull_back(self.leaves[path], states[path], gradient)

    def _divergence(self, states: States, x: jax.Array, reference: np.ndarray):
        head = {**self._head, "norm": {"scale": self._dense(LAST_NORM, states)}}
        target = jax.device_put(np.asarray(reference, np.float32), self._spread)
        return divergence(self.config, head, x, *self._teacher, target)


@partial(jax.jit, donate_argnums=0)
def _added(one: dict[str, jax.Array], other: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.add, one, other)


@partial(jax.jit, static_argnames="config")
def _forward(
    config: ModelConfig, weights: Mapping[str, jax.Array], fixed: Mapping[str, jax.Array], x
) -> jax.Array:
    """A block on x (batch, T, hidden)."""
    return DecoderBlock(config).apply({"params": as_block(weights, fixed)}, x)


@partial(jax.jit, static_argnames=("config", "everywhere"))
def _backward(
    config: ModelConfig,
    weights: Mapping[str, jax.Array],
    fixed: Mapping[str, jax.Array],
    x: jax.Array,
    dy: jax.Array,
    everywhere: NamedSharding,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Gradients with respect to weights and x, from that with respect to what `_forward` gives."""
    _, pullback = jax.vjp(lambda weights, x: _forward(config, weights, fixed, x), weights, x)
    of_weights, dx = pullback(dy)
    # Summed over the devices that have a part of the batch.
    return jax.lax.with_sharding_constraint(of_weights, everywhere), dx
