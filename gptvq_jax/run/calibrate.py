"""Second moments of what the linear layers of a block read, stage by stage.

Activations are in files and pass through the device a batch at a time: x (n, T, hidden), the
block's as far as it has come, and what a stage opens before the next one closes it, `inner`
(models/stages.STAGES). With an asymmetric target the float model's are there as well, at the
entrance of the block, in its middle and at its exit: what a layer that closes a half of the block
outputs in the float model is their difference. Experts have moments of the tokens that they get
(expert_moments.py), and aim at what they would read in the float model. With token weights
(gradients.py) every layer has moments of its own, one for each group of its rows; without, layers
that read the same array share one.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.config import CalibrationSettings
from gptvq_jax.console.layer_kind import layer_kind
from gptvq_jax.core import flops
from gptvq_jax.core.hessian import (
    Moment,
    add_inputs,
    add_products,
    init_moment,
    tile_size,
)
from gptvq_jax.core.products import FLOAT32
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.experts import Routed
from gptvq_jax.models.llama import (
    Params,
    closing_outputs,
    get_layer,
    routed_inputs,
    run_stage,
)
from gptvq_jax.models.stages import CLOSING, STAGES, expert_of
from gptvq_jax.run import expert_moments, token_weights
from gptvq_jax.run.spread import num_devices

Owner = tuple[str, int]  # of a moment: a layer, or the first of those that share it; a row group

LAST = len(STAGES)


class Moments(NamedTuple):
    """Running sums by owner."""

    inputs: dict[Owner, Moment]  # (C, C) w y y^T of the inputs y that a layer will get
    crosses: dict[Owner, Moment]  # w z y^T: (R, C) of its outputs in the float model, or of its
    # inputs there (C, C) where it does not close a half of the block; or empty
    tokens: dict[Owner, jax.Array] = {}  # () int32, how many each expert got


class FloatStates(NamedTuple):
    """The float model's x on the same tokens (batch, T, hidden); None where no stage wants it."""

    entrance: jax.Array | None
    middle: jax.Array | None
    exit: jax.Array | None


_STATES = ((0,), (0, 1), (1,), (1, 2))


def states(config: ModelConfig, stage: int) -> tuple[int, ...]:
    """Which of FloatStates the crosses of a stage want."""
    return _STATES[stage] if closes(config, stage) or stage != 3 else (1,)


def closes(config: ModelConfig, stage: int) -> bool:
    """Whether the layers of a stage, each for itself, make what is added to x."""
    return stage in CLOSING and not (stage == 3 and config.experts)


def opens_again(platform: str | None = None) -> bool:
    """Whether what the feed-forward opens is computed twice, rather than kept in a file.

    It is 3.5 times as wide as x in Llama: on an accelerator the product takes less time than the
    file does, on a CPU more.

    Args:
      platform: as jax.default_backend() says, which is asked where it is None.
    """
    return (platform or jax.default_backend()) != "cpu"


def owners(config: ModelConfig, name: str, weights: Mapping[str, np.ndarray] | None) -> list[Owner]:
    """Whose moments the row groups of a layer use, in their order."""
    if weights is None:
        return [(config.layers.first_of[name], 0)]
    return [(name, k) for k in range(token_weights.num_groups(weights, name))]


def init_moments(
    config: ModelConfig,
    block: Params,
    stages: Sequence[int],
    weights: Mapping[str, np.ndarray] | None = None,
    want_crosses: bool = False,
    products: str = FLOAT32,
) -> Moments:
    """Zeros for the layers of some stages.

    Args:
      config: of the block.
      block: parameters, for the shapes.
      stages: numbers of STAGES.
      weights: of the tokens, as token_weights.py has them, or None.
      want_crosses: whether the float model's states will be there.
      products: of core.products, how inputs are multiplied.
    """
    inputs, crosses, tokens = {}, {}, {}
    for stage in stages:
        for name in itertools.chain(*config.layers.stages[stage]):
            of_layer = owners(config, name, weights)
            for owner in of_layer:
                cols, rows = get_layer(block, owner[0])["kernel"].shape
                inputs[owner] = init_moment(cols, products=products)
                if expert_of(name) is not None:
                    tokens[owner] = jnp.zeros((), jnp.int32)
                if want_crosses:
                    left = rows // len(of_layer) if closes(config, stage) else cols
                    crosses[owner] = init_moment(left, cols, products)
    return Moments(inputs, crosses, tokens)


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
    real: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, Moments]:
    """Takes a batch from the entrance of one stage to that of another, and adds to moments.

    Args:
      config: of the model.
      block: parameters, as far as they are quantized by now.
      x, inner: at the entrance of stage `start`.
      start, stop: numbers of STAGES; LAST is the exit of the block.
      moments: those wanted of layers in stages `start` to `stop`; others are not computed.
      weights: of the tokens, as token_weights.py has them, or None.
      reference: the float model's states, where crosses are wanted.
      float_block: its parameters, likewise; only families with a norm behind a layer need them, and
        experts.
      real: (batch,) 1, or 0 for windows that count nowhere; None: all count.

    Returns:
      x and inner at the entrance of stage `stop`, and the moments.
    """
    for stage in range(start, min(stop + 1, LAST)):
        *after, read = run_stage(config, block, stage, x, inner)
        moments = _add(config, block, stage, read, moments, weights, reference, float_block, real)
        if stage < stop:
            x, inner = after
    return x, inner, moments


def _add(config, block, stage, read, moments, weights, reference, float_block, real) -> Moments:
    """Adds what the layers of a stage read."""
    if isinstance(read, Routed):
        other = None
        if stage in crossed_stages(config, moments):
            of_float = float_block, stage, reference.middle, read.routes
            other = routed_inputs(config, *of_float)
        squares = jnp.square(read.routes.weights)

        def weight_of(kind: str, group: int) -> jax.Array:
            if weights is None:
                return squares
            return token_weights.of_slots(weights, kind, group, read.routes)

        return add_routed(config, stage, read, moments, weight_of, other, real)
    inputs, crosses = dict(moments.inputs), dict(moments.crosses)
    float_read = outputs = None
    for owner in inputs:
        name, group = owner
        if config.layers.stage_of[name] != stage:
            continue
        weight = counted(None if weights is None else weights[name][..., group], read, real)
        inputs[owner] = add_inputs(inputs[owner], read, weight)
        if owner not in crosses:
            continue
        of_float = [reference[number] for number in states(config, stage)]
        if stage in CLOSING:
            rows = crosses[owner].total.shape[0]
            if outputs is None:
                outputs = closing_outputs(config, block, stage, *of_float, float_block)
            other = outputs[..., group * rows : (group + 1) * rows]
        else:
            if float_read is None:
                *_, float_read = run_stage(config, block, stage, *of_float, None)
            other = float_read
        crosses[owner] = add_products(crosses[owner], other, read, weight)
    return Moments(inputs, crosses, moments.tokens)


def add_routed(
    config: ModelConfig,
    stage: int,
    read: Routed,
    moments: Moments,
    weight_of: Callable[[str, int], jax.Array],
    other: jax.Array | None = None,
    real: jax.Array | None = None,
) -> Moments:
    """Adds what the experts of a stage read.

    Args:
      config: of the block.
      stage: 2 or 3.
      read: by them.
      moments: of which those of experts of this stage are wanted.
      weight_of: weights (batch, T, k) of the slots, for a kind of layer and a group of its rows.
      other: what they read in the float model, for crosses.
      real: as in `step`; slots of other windows are no expert's.
    """
    found = Moments(dict(moments.inputs), dict(moments.crosses), dict(moments.tokens))
    weights: dict[Owner, jax.Array] = {}
    experts = read.routes.experts
    if real is not None:
        experts = jnp.where(real[:, None, None] > 0, experts, config.experts)
    slots = expert_moments.sort_slots(experts.reshape(-1), config.experts)
    for owner in moments.inputs:
        name, group = owner
        if config.layers.stage_of[name] != stage:
            continue
        number, kind = expert_of(name), (layer_kind(name), group)
        if kind not in weights:
            weights[kind] = weight_of(*kind)
        found.inputs[owner], cross = expert_moments.add_slots(
            slots,
            number,
            moments.inputs[owner],
            read.inputs,
            weights[kind],
            moments.crosses.get(owner),
            other,
        )
        if cross is not None:
            found.crosses[owner] = cross
        found.tokens[owner] += slots.sizes[number].astype(jnp.int32)
    return found


def counted(weight: jax.Array | None, read: jax.Array, real: jax.Array | None) -> jax.Array | None:
    """Weights (batch, T) of tokens, which are 0 in windows that do not count; None: all are 1."""
    if real is None:
        return weight
    return jnp.broadcast_to(real[:, None], read.shape[:2]) * (1.0 if weight is None else weight)


def crossed_stages(config: ModelConfig, moments: Moments) -> set[int]:
    """Those whose layers aim at the float model."""
    return {config.layers.stage_of[name] for name, _ in moments.crosses}


def moment_flops(config: ModelConfig, moments: Moments, tokens: int) -> int:
    """Of adding so many tokens, of which an expert gets its part on average.

    The moments may be partial sums of several devices.
    """
    size = 0
    part = tokens * config.experts_per_token // max(1, config.experts)
    for owner, moment in moments.inputs.items():
        cols, seen = moment.total.shape[-1], part if owner in moments.tokens else tokens
        size += flops.second_moment(seen, cols, tile_size(cols))
        if owner in moments.crosses:
            size += flops.cross_moment(seen, *moments.crosses[owner].total.shape[-2:])
    return size


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


def batches(count: int, batch_size: int, devices: int = 1) -> Iterator[slice]:
    """Slices of equal size, so that one compiled step serves them all.

    Args:
      count: of windows.
      batch_size: the most windows of a slice, or one for each device where these are more.
      devices: over which a slice is spread; where they do not divide `count` the last is shorter.
    """
    most = max(batch_size // devices, 1) * devices
    sizes = (s for s in range(min(most, count), 0, -1) if count % s == 0 and s % devices == 0)
    size = next(sizes, most)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def window_batches(calibration: CalibrationSettings) -> Iterator[slice]:
    """Of the windows that are fitted, then of those that are held out.

    Those of each kind are of equal size where devices divide their number, as large as
    `calibration.batch_size` allows.
    """
    fitted, size, devices = calibration.num_windows, calibration.batch_size, num_devices()
    yield from batches(fitted, size, devices)
    for part in batches(calibration.held_out, size, devices):
        yield slice(fitted + part.start, fitted + part.stop)


def on_device(activations: np.ndarray, products: str = FLOAT32) -> jax.Array | np.ndarray:
    """A batch of activations; still on the host where several devices will share it.

    Args:
      activations: (n, T, C).
      products: 'float32' or 'bfloat16', the dtype of the result: a block is multiplied as that.
    """
    array = np if num_devices() > 1 else jnp
    return array.asarray(activations, jnp.dtype(products))
