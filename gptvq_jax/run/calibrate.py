"""Calibration of one transformer block: the moments of what its linear layers read.

Activations live on disk in bfloat16 and pass through the device a batch at a time. With an
asymmetric target there are two streams of them: what the quantized model computes, and what the
float model computes on the same tokens. With token weights (gradients.py) every layer has moments
of its own, one for each group of its rows; without, layers that read the same input share one.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.core.hessian import Moment, add_inputs, add_products, init_moment, mean, mean_product
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import (
    LINEAR_GROUPS,
    Params,
    block_forward,
    block_forward_with_inputs,
    get_layer,
)
from gptvq_jax.run.activations import Activations, Writer

Groups = Sequence[Sequence[str]]  # names of layers that share one input
Owner = tuple[str, int]  # of a moment: a layer, or the first of those that share it; a row group

_READS = {name: group[0] for group in LINEAR_GROUPS for name in group}


class Calibrated(NamedTuple):
    """Statistics of the layers, by owner."""

    hessians: dict[Owner, jax.Array]  # (C, C) mean x^ x^^T of the inputs x^ that a layer will get
    crosses: dict[Owner, jax.Array]  # (C, C) mean x x^^T, x of the float model; or empty


def owners(name: str, weights: Mapping[str, np.ndarray] | None) -> list[Owner]:
    """Whose moments the row groups of a layer use, in their order."""
    if weights is None:
        return [(_READS[name], 0)]
    return [(name, k) for k in range(weights[name].shape[-1])]


@partial(
    jax.jit,
    static_argnames=("config", "keep_output"),
    donate_argnames=("moments", "crosses"),
)
def accumulate(
    config: ModelConfig,
    block: Params,
    x: jax.Array,
    moments: dict[Owner, Moment],
    weights: dict[str, jax.Array] | None = None,
    reference: tuple[Params, jax.Array] | None = None,
    crosses: dict[Owner, Moment] | None = None,
    keep_output: bool = False,
) -> tuple[jax.Array | None, dict[Owner, Moment], dict[Owner, Moment] | None]:
    """Adds one batch of block inputs x (batch, T, hidden) to moments.

    Args:
      config: of the model.
      block: parameters, as far as they are quantized by now.
      x: inputs of the block.
      moments: those wanted; others are not computed.
      weights: of the tokens, {layer: (batch, T, g)}, or None.
      reference: the float block and its inputs on the same tokens, or None.
      crosses: sums of x x^^T, where there is a reference.
      keep_output: also return the outputs, of the reference where there is one.
    """

    def weight_of(owner):
        name, group = owner
        return None if weights is None else weights[name][..., group]

    y, read = block_forward_with_inputs(config, block, x)
    if reference is not None:
        y, float_read = block_forward_with_inputs(config, *reference)
        crosses = {
            o: add_products(c, float_read[_READS[o[0]]], read[_READS[o[0]]], weight_of(o))
            for o, c in crosses.items()
        }
    moments = {o: add_inputs(m, read[_READS[o[0]]], weight_of(o)) for o, m in moments.items()}
    return (y if keep_output else None), moments, crosses


def calibrate(
    config: ModelConfig,
    block: Params,
    activations: Activations,
    groups: Groups,
    batch_size: int,
    *,
    weights: Mapping[str, np.ndarray] | None = None,
    power: float = 1.0,
    reference: tuple[Params, Activations] | None = None,
    want_crosses: bool = True,
    out: Writer | None = None,
) -> Calibrated:
    """Runs all calibration windows through a block.

    Args:
      config: of the model.
      block: parameters, as far as they are quantized by now.
      activations: inputs of the block (n, T, hidden).
      groups: layer groups whose statistics are wanted.
      batch_size: most windows per forward pass.
      weights: of the tokens, {layer: (n, T, g)}, or None.
      power: that the weights are raised to.
      reference: the float block and its activations on the same tokens, or None.
      want_crosses: whether moments with the reference are wanted, or only its outputs.
      out: receives the outputs (n, T, hidden), of the reference where there is one.
    """
    wanted = dict.fromkeys(o for group in groups for name in group for o in owners(name, weights))

    def zeros():
        return {o: init_moment(get_layer(block, o[0])["kernel"].shape[0]) for o in wanted}

    moments, crosses = zeros(), None
    if reference is not None:
        crosses = zeros() if want_crosses else {}
    if weights is not None:
        weights = {name: relative_weights(weights[name], power) for name in {o[0] for o in wanted}}
    for part in batches(len(activations), batch_size):
        other = None if reference is None else (reference[0], on_device(reference[1][part]))
        of_part = None if weights is None else {n: jnp.asarray(w[part]) for n, w in weights.items()}
        y, moments, crosses = accumulate(
            config,
            block,
            on_device(activations[part]),
            moments,
            of_part,
            other,
            crosses,
            out is not None,
        )
        if out is not None:
            out[part] = y
    hessians = {owner: mean(moment) for owner, moment in moments.items()}
    crosses = {owner: mean_product(moment) for owner, moment in (crosses or {}).items()}
    return jax.block_until_ready(Calibrated(hessians, crosses))


def relative_weights(weights: np.ndarray, power: float = 1.0) -> np.ndarray:
    """weights^power over their mean in each row group; 1 where all are 0.

    Squared gradients have long tails: in SmolLM2 half of their sum is often on 1 % of the tokens,
    fewer than a layer has inputs. A power below 1 keeps such a Hessian from being that of noise.

    Args:
      weights: of the tokens (n, T, g).
      power: above 0.
    """
    weights = np.power(weights, power, dtype=np.float64)
    means = weights.mean(axis=(0, 1))
    return np.where(means > 0, weights / np.where(means > 0, means, 1.0), 1.0).astype(np.float32)


def advance(
    config: ModelConfig, block: Params, activations: Activations, batch_size: int, out: Writer
) -> None:
    """Writes the outputs of a block (n, T, hidden) on activations of that shape."""
    for part in batches(len(activations), batch_size):
        out[part] = block_forward(config, block, on_device(activations[part]))


def batches(count: int, batch_size: int) -> Iterator[slice]:
    """Slices of equal size, so that one compiled step serves them all."""
    size = next(s for s in range(min(batch_size, count), 0, -1) if count % s == 0)
    return (slice(start, start + size) for start in range(0, count, size))


def on_device(activations: np.ndarray) -> jax.Array:
    """A batch of activations in float32."""
    return jnp.asarray(activations, jnp.float32)
