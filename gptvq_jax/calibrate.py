"""Calibration of one transformer block: the moments of what its linear layers read.

Activations live on the host in bfloat16 and pass through the device a batch at a time. With an
asymmetric target there are two streams of them: what the quantized model computes, and what the
float model computes on the same tokens.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.hessian import Moment, add_inputs, add_products, init_moment, mean, mean_product
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import Params, block_forward, block_forward_with_inputs, get_layer

Groups = Sequence[Sequence[str]]  # names of layers that share one input


class Calibrated(NamedTuple):
    """Statistics of the layer groups, by the first name of each."""

    hessians: dict[str, jax.Array]  # (C, C) mean x^ x^T^ of the inputs x^ that a layer will get
    crosses: dict[str, jax.Array]  # (C, C) mean x x^^T, x of the float model; empty with one stream
    outputs: np.ndarray | None  # of the float block, if asked for


@partial(
    jax.jit,
    static_argnames=("config", "keep_output"),
    donate_argnames=("moments", "crosses"),
)
def accumulate(
    config: ModelConfig,
    block: Params,
    x: jax.Array,
    moments: dict[str, Moment],
    reference: tuple[Params, jax.Array] | None = None,
    crosses: dict[str, Moment] | None = None,
    keep_output: bool = False,
) -> tuple[jax.Array | None, dict[str, Moment], dict[str, Moment] | None]:
    """Adds one batch of block inputs x (batch, T, hidden) to the moments of the groups named.

    Args:
      config: of the model.
      block: parameters, as far as they are quantized by now.
      x: inputs of the block.
      moments: by the first name of each group; other groups are not computed.
      reference: the float block and its inputs on the same tokens, or None.
      crosses: sums of x x^^T, where there is a reference.
      keep_output: also return the outputs, of the reference where there is one.
    """
    y, inputs = block_forward_with_inputs(config, block, x)
    if reference is not None:
        y, float_inputs = block_forward_with_inputs(config, *reference)
        crosses = {n: add_products(c, float_inputs[n], inputs[n]) for n, c in crosses.items()}
    moments = {n: add_inputs(m, inputs[n]) for n, m in moments.items()}
    return (y if keep_output else None), moments, crosses


def calibrate(
    config: ModelConfig,
    block: Params,
    activations: np.ndarray,
    groups: Groups,
    batch_size: int,
    *,
    reference: tuple[Params, np.ndarray] | None = None,
    keep_output: bool = False,
) -> Calibrated:
    """Runs all calibration windows through a block.

    Args:
      config: of the model.
      block: parameters, as far as they are quantized by now.
      activations: inputs of the block (n, T, hidden), bfloat16, on the host.
      groups: layer groups whose statistics are wanted.
      batch_size: most windows per forward pass.
      reference: the float block and its activations on the same tokens, or None.
      keep_output: also return the outputs (n, T, hidden), of the reference where there is one.
    """

    def zeros():
        cols = {g[0]: get_layer(block, g[0])["kernel"].shape[0] for g in groups}
        return {name: init_moment(c) for name, c in cols.items()}

    moments, crosses = zeros(), None if reference is None else zeros()
    outputs = np.empty_like(activations) if keep_output else None
    for part in batches(len(activations), batch_size):
        other = None if reference is None else (reference[0], _on_device(reference[1][part]))
        y, moments, crosses = accumulate(
            config, block, _on_device(activations[part]), moments, other, crosses, keep_output
        )
        if keep_output:
            outputs[part] = np.asarray(y.astype(jnp.bfloat16))
    hessians = {name: mean(moment) for name, moment in moments.items()}
    crosses = {name: mean_product(moment) for name, moment in (crosses or {}).items()}
    return jax.block_until_ready(Calibrated(hessians, crosses, None))._replace(outputs=outputs)


def advance(
    config: ModelConfig, block: Params, activations: np.ndarray, batch_size: int
) -> np.ndarray:
    """Outputs of a block (n, T, hidden) on activations of that shape, bfloat16, on the host."""
    outputs = np.empty_like(activations)
    for part in batches(len(activations), batch_size):
        y = block_forward(config, block, _on_device(activations[part]))
        outputs[part] = np.asarray(y.astype(jnp.bfloat16))
    return outputs


def batches(count: int, batch_size: int) -> Iterator[slice]:
    """Slices of equal size, so that one compiled step serves them all."""
    size = next(s for s in range(min(batch_size, count), 0, -1) if count % s == 0)
    return (slice(start, start + size) for start in range(0, count, size))


def _on_device(activations: np.ndarray) -> jax.Array:
    return jnp.asarray(activations, jnp.float32)
