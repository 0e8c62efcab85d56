"""A packed model whose continuous leaves are tuned: its loss, and gradients of all of them.

The codes of all blocks are in memory, cut out once, a byte or two for each; a block is there as
weights while a batch goes through it, forward and once more on the way back, and what lies between
two blocks is kept meanwhile: no more of what a block computes is (rematerialization). Gradients
with respect to a block's weights become those of its parameters before the next block is decoded.

Costs, for P weights in all blocks, N tokens at once, and D weights a code:
  flops: models/flops.model_tuning: 2 P N forward, again, and 4 P N backward; two heads forward
    and one back. Two decodings, P / D lookups each, and P / D additions are small beside them.
  memory: codes; two blocks as weights, one as gradients; the inputs of all blocks, depth * N *
    hidden * 4 bytes; what one block keeps for its backward pass; both heads.
With several devices a batch is spread over them (data-parallel), and everything else is on all.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.core.mesh import AXIS, local_mesh
from gptvq_jax.methods import leaf_steps
from gptvq_jax.methods.leaf_steps import LeafState, Rates
from gptvq_jax.methods.trainable import Parameters, Unpacked, unpack
from gptvq_jax.models import flops
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import DecoderBlock, Params
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


class Student:
    """See above; what changes is in `States`, which it does not hold.

    Args:
      checkpoint: of the model.
      teacher: the float model.
      batch: windows at once; of the devices here, as many are used as divide it evenly.
      stopwatch: receives the operations.
    """

    def __init__(
        self, checkpoint: PackedCheckpoint, teacher: Teacher, batch: int, stopwatch: Stopwatch
    ):
        self.config, self._stopwatch = checkpoint.config, stopwatch
        devices = local_mesh().devices.flat
        mesh = Mesh(devices[: math.gcd(len(devices), batch)], (AXIS,))
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

    def gradients(
        self, states: States, tokens: np.ndarray, reference: np.ndarray, tokens_of_step: int
    ) -> tuple[jax.Array, Gradients]:
        """Of a batch, as its part of a step.

        Args:
          states: of the leaves.
          tokens: (batch, T).
          reference: what the float model's last block leaves (batch, T, hidden).
          tokens_of_step: by which sums over tokens are divided.

        Returns:
          The KL divergence summed over the tokens of each window (batch,), undivided; and
          gradients of the divided sum.
        """
        x, entrances = self._embedded(tokens), []
        for index in range(len(self._fixed)):
            entrances.append(x)
            x = _forward(*self._decoded(index, states), x)
        kl, dx, of_scale = self._divergence(states, x, reference)
        factor = 1 / tokens_of_step
        norm, of_norm = self.leaves[LAST_NORM], of_scale * factor
        found = {LAST_NORM: leaf_steps.pull_back(norm, states[LAST_NORM].params, of_norm)}
        dx = dx * factor
        for index in reversed(range(len(self._fixed))):
            decoded = self._decoded(index, states)
            of_weights, dx = _backward(*decoded, entrances.pop(), dx, self._everywhere)
            for name, gradient in of_weights.items():
                path = f"layers_{index}/{name}"
                leaf, params = self.leaves[path], states[path].params
                found[path] = leaf_steps.pull_back(leaf, params, gradient)
        self._stopwatch.flops(flops.model_tuning(self.config, *tokens.shape))
        return kl, found

    def divergences(self, states: States, tokens: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """The mean KL divergence over the tokens of each window (batch,), in nats.

        Args are those of `gradients`.
        """
        x = self._embedded(tokens)
        for index in range(len(self._fixed)):
            x = _forward(*self._decoded(index, states), x)
        kl, _, _ = self._divergence(states, x, reference)
        shape = tokens.shape
        forward = flops.blocks_forward(self.config, *shape)
        self._stopwatch.flops(forward + flops.divergence(self.config, *shape))
        return np.asarray(kl) / shape[1]

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

    def _embedded(self, tokens: np.ndarray) -> jax.Array:
        rows = np.asarray(rows_of(self.config, self._outer, tokens), np.float32)
        return jax.device_put(rows, self._spread)

    def _decoded(self, index: int, states: States) -> tuple[ModelConfig, Mapping, Mapping]:
        weights = {}
        for name in self._names[index]:
            path = f"layers_{index}/{name}"
            weights[name] = leaf_steps.decode(self.leaves[path], states[path].params)
        return self.config.of_block(index), weights, self._fixed[index]

    def _divergence(self, states: States, x: jax.Array, reference: np.ndarray):
        scale = leaf_steps.decode(self.leaves[LAST_NORM], states[LAST_NORM].params)
        head = {**self._head, "norm": {"scale": scale}}
        target = jax.device_put(np.asarray(reference, np.float32), self._spread)
        return divergence(self.config, head, x, *self._teacher, target)


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
