"""Block tuning (AQLM, arXiv 2401.06118, section 3.4): gradients on what a quantized block outputs.

Layers are quantized one by one, each for itself. What they have in common is the output of their
block: once the codes are chosen, the codebooks, scales and norms of the whole block are tuned by
Adam, so that the block gives on the inputs of the quantized model what the float block gives on
those of the float model. The last windows of the calibration text are held out: they say when to
stop, and which epoch to keep. They are those that calibration.held_out keeps, which the codes were
not fitted to either.

A step has three parts, compiled apart: weights from parameters, one program for each kind of
tensor; loss and gradients with respect to the weights, one program for all blocks of a model; and
from there to parameters and Adam, again by kind of tensor (methods/leaf_steps.py, which the tuning
of the whole model shares). So a block with another mix of index bits compiles nothing that is
large.

Costs, for P weights in a block and batches of N tokens, attention apart:
  flops: 2 P N forward and 4 P N backward. The lookups and the additions to centroids, P / D each,
    and Adam on the parameters, about P / 64, are small beside them.
  memory: the block as weights and their gradients, 8 P bytes; what a batch keeps for its backward
    pass; parameters and the moments of Adam, far less. Activations are read a batch at a time.
For SmolLM2-135M (P = 3.54e6) and 4 x 512 tokens, on 2 CPU cores: forward is 15 GFLOP in 0.11 s, so
a step should take 0.33 s. Loss and gradients take 0.39 s; the lookups, the additions to centroids
and Adam 0.02 s with GPTQ, 0.05 s with 2D GPTVQ and 0.08 s with 2x8 AQLM. On a machine with other
work on it an epoch of 7 steps of 2x8 AQLM took 4.0 s.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util

from gptvq_jax.config import TuneSettings
from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.methods import leaf_steps
from gptvq_jax.methods.leaf_steps import LeafState, Rates
from gptvq_jax.methods.trainable import Leaf, Unpacked, unpack
from gptvq_jax.models import flops
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import DecoderBlock, Params, block_forward
from gptvq_jax.run.activations import Activations
from gptvq_jax.run.calibrate import batches, on_device
from gptvq_jax.storage.tree_io import cast_dense


class Pairs(NamedTuple):
    """Windows of what a block reads, and of what it should output then; both (n, T, hidden)."""

    inputs: Activations
    outputs: Activations


def tune_block(
    config: ModelConfig,
    block: Params,
    pairs: Pairs,
    settings: TuneSettings,
    *,
    held_out: int,
    dense_dtype: str,
    order: np.random.Generator,
    name: str = "block",
    on_epoch: Callable[[str], None] = lambda text: None,
    stopwatch: Stopwatch | None = None,
) -> tuple[Params, dict[str, Any]]:
    """Tunes the quantized weights and norms of a block; kernels that are dense stay as they are.

    What is lowered is mean |block(x) - y|^2 / mean |y - x|^2 over tokens, the error relative to
    what the block has to add to its inputs x. It is always that of the block as it is stored.

    Args:
      config: of the model.
      block: nested dict; each kernel is a QuantizedTensor or a dense (in, out) array.
      pairs: n windows, of which the last `held_out` are not tuned on.
      settings: of the tuning.
      held_out: at least 1.
      dense_dtype: in which the norms will be stored.
      order: draws the order of the windows.
      name: of the block, for messages.
      on_epoch: called after each epoch with a line on it.
      stopwatch: receives the operations.

    Returns:
      The block after the epoch with the least held-out error, or as it was given if that is less,
      with norms in `dense_dtype`. And metrics: tune_error_before and tune_error_after, held out;
      epochs, those run; diverged: a step was not finite, which ended the tuning.
    """
    stopwatch = stopwatch or Stopwatch()
    leaves, fixed = split(block, dense_dtype)
    trained = {name: unpack(leaf) for name, leaf in leaves.items()}
    time = pairs.inputs.shape[1]
    count = len(pairs.inputs) - held_out
    kept_out = [
        slice(count + part.start, count + part.stop)
        for part in batches(held_out, settings.batch_size)
    ]
    power = _power(pairs, kept_out)

    def error_of(states):
        stopwatch.flops(flops.block_forward(config, held_out, time))
        return _squared_error(config, trained, fixed, states, pairs, kept_out) / power

    states = {name: leaf_steps.start(leaf) for name, leaf in trained.items()}
    before = lowest = error_of(states)
    best, kept, stale, diverged = states, 0, 0, False
    epoch = 0
    while epoch < settings.epochs and stale < settings.patience and not diverged:
        epoch += 1
        finite = []
        for windows in _shuffled(order, count, settings.batch_size):
            x, y = _read(pairs, windows)  # while the device is busy with the step before
            if not all(finite):
                break
            stopwatch.flops(flops.block_tuning(config, len(windows), time))
            states, finite = _step(config, trained, fixed, states, x, y, power, settings)
        error = error_of(states) if all(finite) else np.nan
        diverged = not np.isfinite(error)
        stale = 0 if error < lowest * (1 - settings.tolerance) else stale + 1
        if error < lowest:
            best, kept, lowest = states, epoch, error
        on_epoch(f"{name} tuning: error {before:.4g} -> {error:.4g}")
    if diverged:
        logging.warning(
            "%s: a tuning step in epoch %d is not finite; kept the state after epoch %d",
            name,
            epoch,
            kept,
        )
    if kept:
        leaves = {n: leaf_steps.stored(leaf, trained[n], best[n]) for n, leaf in leaves.items()}
    row = {
        "tune_error_before": before,
        "tune_error_after": lowest,
        "epochs": epoch,
        "diverged": diverged,
    }
    return traverse_util.unflatten_dict({**fixed, **leaves}, sep="/"), row


def split(block: Params, dense_dtype: str = "") -> tuple[dict[str, Leaf], dict[str, jax.Array]]:
    """What is tuned, norms and biases as they will be stored; and the dense kernels: by paths.

    Args:
      block: as `tune_block` takes it.
      dense_dtype: of norms and biases; "": that which they have.
    """
    trained, fixed = {}, {}
    for name, leaf in traverse_util.flatten_dict(block, sep="/").items():
        if isinstance(leaf, QuantizedTensor):
            trained[name] = leaf
        elif name.endswith("kernel"):
            fixed[name] = leaf
        else:
            trained[name] = jnp.asarray(
                cast_dense(leaf, dense_dtype, name) if dense_dtype else leaf
            )
    return trained, fixed


def _step(config, trained, fixed, states, x, y, power, settings) -> tuple[dict, list]:
    """One step of Adam on a batch; and whether everything in it was finite, as flags."""
    loss, gradients = _gradients(config, decoded(trained, states), fixed, x, y, power)
    rates = Rates(*(settings.learning_rate,) * 3, settings.b1, settings.b2)
    updated = {}
    for name, leaf in trained.items():
        of_leaf = leaf_steps.pull_back(leaf, states[name], gradients[name])
        updated[name] = leaf_steps.update(leaf, states[name], of_leaf, rates)
    finite = [jnp.isfinite(loss), *(of_leaf for _, of_leaf in updated.values())]
    return {name: state for name, (state, _) in updated.items()}, finite


@partial(jax.jit, static_argnames="config")
def _gradients(
    config: ModelConfig,
    weights: dict[str, jax.Array],
    fixed: dict[str, jax.Array],
    x: jax.Array,
    y: jax.Array,
    power: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch (batch, T, hidden), and its gradients in the shapes of `weights`."""

    def loss(weights):
        output = DecoderBlock(config).apply({"params": as_block(weights, fixed)}, x)
        return jnp.mean(jnp.square(output - y)) / power

    return jax.value_and_grad(loss)(weights)


def decoded(trained: dict[str, Unpacked], states: dict[str, LeafState]) -> dict[str, jax.Array]:
    """Weights (out, in) and norms that they stand for as they would be stored, by their paths."""
    return {name: leaf_steps.decode(leaf, states[name]) for name, leaf in trained.items()}


def as_block(weights: dict[str, jax.Array], fixed: dict[str, jax.Array]) -> Params:
    """A block with dense kernels, from weights (out, in) and kernels (in, out)."""
    turned = {n: w.T if n.endswith("kernel") else w for n, w in weights.items()}
    return traverse_util.unflatten_dict({**fixed, **turned}, sep="/")


def _squared_error(config, trained, fixed, states, pairs, parts) -> float:
    """Mean |block(x) - y|^2 / hidden over windows, with the block as it would be stored."""
    block = as_block(decoded(trained, states), fixed)
    errors = []
    for part in parts:
        x, y = _read(pairs, part)
        errors.append(_mean_square(block_forward(config, block, x) - y))
    return float(np.mean(errors))


def _power(pairs: Pairs, parts: list[slice]) -> float:
    """Mean |y - x|^2 / hidden over windows, or 1 where that is 0."""
    power = float(np.mean([_mean_square(y - x) for x, y in (_read(pairs, p) for p in parts)]))
    return power if power > 0 else 1.0


_mean_square = jax.jit(lambda x: jnp.mean(jnp.square(x)))


def _read(pairs: Pairs, windows: slice | np.ndarray) -> tuple[jax.Array, jax.Array]:
    return on_device(pairs.inputs[windows]), on_device(pairs.outputs[windows])


def _shuffled(order: np.random.Generator, count: int, batch_size: int) -> Iterator[np.ndarray]:
    """Batches of an epoch in random order; what does not fill one waits for another epoch."""
    windows = order.permutation(count)
    return (windows[i : i + batch_size] for i in range(0, count - batch_size + 1, batch_size))
