"""Second moments of what the linear layers of a block read, stage by stage.

Activations are in files and pass through the device a batch at a time: x (n, T, hidden), the
block's as far as it has come, and what a stage opens before the next one closes it, `inner`
(models/stages.STAGES). With an asymmetric target the float model's are there as well, at the
entrance of the block, in its middle and at its exit: what a layer that closes a half of the block
outputs in the float model is their difference. With token weights (gradients.py) every layer has
moments of its own, one for each group of its rows; without, layers that read the same array share
one.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.config import CalibrationSettings
from gptvq_jax.core import flops
from gptvq_jax.core.hessian import (
    Moment,
    add_inputs,
    add_products,
    factorize,
    init_moment,
    mean,
    mean_product,
    tile_size,
)
from gptvq_jax.methods.layer import Objective
from gptvq_jax.methods.pool import parallel
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import Params, closing_outputs, get_layer, run_stage
from gptvq_jax.models.stages import CLOSING, STAGES

Owner = tuple[str, int]  # of a moment: a layer, or the first of those that share it; a row group

LAST = len(STAGES)


class Moments(NamedTuple):
    """Running sums by owner."""

    inputs: dict[Owner, Moment]  # (C, C) w y y^T of the inputs y that a layer will get
    crosses: dict[Owner, Moment]  # w z y^T: (R, C) of its outputs in the float model, or of its
    # inputs there (C, C) where it does not close a half of the block; or empty


class FloatStates(NamedTuple):
    """The float model's x on the same tokens (batch, T, hidden); None where no stage wants it."""

    entrance: jax.Array | None
    middle: jax.Array | None
    exit: jax.Array | None


STATES = ((0,), (0, 1), (1,), (1, 2))  # of FloatStates, that the crosses of a stage want


def owners(config: ModelConfig, name: str, weights: Mapping[str, np.ndarray] | None) -> list[Owner]:
    """Whose moments the row groups of a layer use, in their order."""
    if weights is None:
        return [(config.layers.first_of[name], 0)]
    return [(name, k) for k in range(weights[name].shape[-1])]


def init_moments(
    config: ModelConfig,
    block: Params,
    stages: Sequence[int],
    weights: Mapping[str, np.ndarray] | None = None,
    want_crosses: bool = False,
) -> Moments:
    """Zeros for the layers of some stages.

    Args:
      config: of the block.
      block: parameters, for the shapes.
      stages: numbers of STAGES.
      weights: of the tokens {layer: (..., g)}, or None.
      want_crosses: whether the float model's states will be there.
    """
    inputs, crosses = {}, {}
    for stage in stages:
        for name in itertools.chain(*config.layers.stages[stage]):
            of_layer = owners(config, name, weights)
            for owner in of_layer:
                cols, rows = get_layer(block, owner[0])["kernel"].shape
                inputs[owner] = init_moment(cols)
                if want_crosses:
                    left = rows // len(of_layer) if stage in CLOSING else cols
                    crosses[owner] = init_moment(left, cols)
    return Moments(inputs, crosses)


@partial(jax.jit, static_argnames=("config", "start", "stop"), donate_argnames="moments")
def step(
    config: ModelConfig,
    block: Params,
    x: jax.Array,
    inner: jax.Array | None,
    start: int,
    stop: int,
    moments: Moments,
    weights: dict[str, jax.Array] | None = None,
    reference: FloatStates | None = None,
    float_block: Params | None = None,
) -> tuple[jax.Array, jax.Array | None, Moments]:
    """Takes a batch from the entrance of one stage to that of another, and adds to moments.

    Args:
      config: of the model.
      block: parameters, as far as they are quantized by now.
      x, inner: at the entrance of stage `start`.
      start, stop: numbers of STAGES; LAST is the exit of the block.
      moments: those wanted of layers in stages `start` to `stop`; others are not computed.
      weights: of the tokens, {layer: (batch, T, g)}, or None.
      reference: the float model's states, where crosses are wanted.
      float_block: its parameters, likewise; only families with a norm behind a layer need them.

    Returns:
      x and inner at the entrance of stage `stop`, and the moments.
    """
    for stage in range(start, min(stop + 1, LAST)):
        *after, read = run_stage(config, block, stage, x, inner)
        moments = _add(config, block, stage, read, moments, weights, reference, float_block)
        if stage < stop:
            x, inner = after
    return x, inner, moments


def _add(config, block, stage, read, moments, weights, reference, float_block) -> Moments:
    """Adds what the layers of a stage read."""
    inputs, crosses = dict(moments.inputs), dict(moments.crosses)
    float_read = outputs = None
    for owner in inputs:
        name, group = owner
        if config.layers.stage_of[name] != stage:
            continue
        weight = None if weights is None else weights[name][..., group]
        inputs[owner] = add_inputs(inputs[owner], read, weight)
        if owner not in crosses:
            continue
        states = [reference[number] for number in STATES[stage]]
        if stage in CLOSING:
            rows = crosses[owner].total.shape[0]
            if outputs is None:
                outputs = closing_outputs(config, block, stage, *states, float_block)
            other = outputs[..., group * rows : (group + 1) * rows]
        else:
            if float_read is None:
                *_, float_read = run_stage(config, block, stage, *states, None)
            other = float_read
        crosses[owner] = add_products(crosses[owner], other, read, weight)
    return Moments(inputs, crosses)


def crossed_stages(config: ModelConfig, moments: Moments) -> set[int]:
    """Those whose layers aim at the float model."""
    return {config.layers.stage_of[name] for name, _ in moments.crosses}


def moment_flops(moments: Moments, tokens: int) -> int:
    """Of adding so many tokens."""
    size = 0
    for moment in moments.inputs.values():
        cols = moment.total.shape[0]
        size += flops.second_moment(tokens, cols, tile_size(cols))
    for moment in moments.crosses.values():
        size += flops.cross_moment(tokens, *moment.total.shape)
    return size


def hessians(moments: Moments) -> dict[Owner, jax.Array]:
    """Mean w y y^T by owner, (C, C)."""
    return {owner: mean(moment) for owner, moment in moments.inputs.items()}


def objectives(moments: Moments, damping: float, name: str) -> dict[Owner, Objective]:
    """By owner, its Hessian and the factor; without a shift.

    Args:
      moments: of all windows.
      damping: of `hessian.factorize`.
      name: of the block, for messages.
    """
    found = hessians(moments)
    factors = parallel(lambda owner: factorize(found[owner], damping, f"{name}/{owner[0]}"), found)
    pairs = zip(found.values(), factors, strict=True)
    return dict(zip(found, itertools.starmap(Objective, pairs), strict=True))


def factor_flops(moments: Moments) -> float:
    """Of `objectives`."""
    return sum(flops.inverse_cholesky(m.total.shape[0]) for m in moments.inputs.values())


def shift(
    config: ModelConfig, moments: Moments, owner: Owner, weight: jax.Array, hessian: jax.Array
) -> jax.Array:
    """S of `hessian.asymmetric_target` for the rows (R, C) of an owner."""
    name, _ = owner
    cross = mean_product(moments.crosses[owner])
    if config.layers.stage_of[name] in CLOSING:
        return cross - jnp.matmul(weight, hessian, precision="highest")
    return jnp.matmul(weight, cross - hessian, precision="highest")


def relative_weights(
    weights: np.ndarray, power: float = 1.0, num_fitted: int | None = None
) -> np.ndarray:
    """weights^power over their mean in each row group; 1 where all are 0.

    Squared gradients have long tails: in SmolLM2 half of their sum is often on 1 % of the tokens,
    fewer than a layer has inputs. A power below 1 keeps such a Hessian from being that of noise.

    Args:
      weights: of the tokens (n, T, g).
      power: above 0.
      num_fitted: the mean is of so many windows, from the first; None: of all.
    """
    weights = np.power(weights, power, dtype=np.float64)
    means = weights[:num_fitted].mean(axis=(0, 1))
    return np.where(means > 0, weights / np.where(means > 0, means, 1.0), 1.0).astype(np.float32)


def finite(array: jax.Array, what: str) -> np.ndarray:
    """The array on the host.

    Raises:
      ValueError: an entry is not finite.
    """
    array = np.asarray(array)
    if not np.isfinite(array).all():
        raise ValueError(
            f"{what} is not finite; check the model's weights and the calibration text, "
            "or set calibration.gradient_groups=0"
        )
    return array


def batches(count: int, batch_size: int) -> Iterator[slice]:
    """Slices of equal size, so that one compiled step serves them all."""
    size = next((s for s in range(min(batch_size, count), 0, -1) if count % s == 0), 1)
    return (slice(start, start + size) for start in range(0, count, size))


def window_batches(calibration: CalibrationSettings) -> Iterator[slice]:
    """Of the windows that are fitted, then of those that are held out.

    Those of each kind are of equal size, as large as `calibration.batch_size` allows.
    """
    fitted, size = calibration.num_windows, calibration.batch_size
    yield from batches(fitted, size)
    for part in batches(calibration.held_out, size):
        yield slice(fitted + part.start, fitted + part.stop)


def on_device(activations: np.ndarray) -> jax.Array:
    """A batch of activations in float32."""
    return jnp.asarray(activations, jnp.float32)
