"""Calibration windows that are fitted, and windows held out beside them, through the block at work.

The windows held out (calibration.held_out) are the last ones. They are taken through the model as
the others are, and what layers read there has sums of its own: by these a layer is judged, in the
same currency, token weights included, and nothing is fitted to them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.config import CalibrationSettings
from gptvq_jax.core.products import FLOAT32
from gptvq_jax.methods.layer import Objective, Problem
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import Params
from gptvq_jax.run import spread, token_weights
from gptvq_jax.run.activations import Activations, Writer
from gptvq_jax.run.calibrate import (
    FloatStates,
    Moments,
    Owner,
    crossed_stages,
    init_moments,
    on_device,
    owners,
    states,
    step,
    window_batches,
)


class Sums(NamedTuple):
    """Moments of the windows that are fitted, and likewise of those that are held out."""

    fitted: Moments
    held_out: Moments


NO_SUMS = Sums(Moments({}, {}), Moments({}, {}))


def init_sums(
    config: ModelConfig,
    block: Params,
    stages: Sequence[int],
    weights: Mapping[str, np.ndarray] | None = None,
    want_crosses: bool = False,
    held_out: bool = True,
    products: str = FLOAT32,
) -> Sums:
    """`init_moments` twice; empty ones where no windows are `held_out`.

    The sums of both are alike, so that one compiled step adds to either.
    """
    arguments = config, block, stages, weights, want_crosses, products
    kept = init_moments(*arguments) if held_out else Moments({}, {})
    return Sums(init_moments(*arguments), kept)


class Files(NamedTuple):
    """Where batches come from and go to."""

    x: Activations
    inner: Activations | None = None
    reference: tuple[Activations, Activations, Activations] | None = None  # as FloatStates


def run_windows(
    config: ModelConfig,
    block: Params,
    files: Files,
    start: int,
    stop: int,
    sums: Sums,
    calibration: CalibrationSettings,
    weights: Mapping[str, np.ndarray] | None = None,
    out: Writer | None = None,
    float_block: Params | None = None,
) -> Sums:
    """Runs all calibration windows through `step`.

    Args:
      config, block, start, stop: of `step`.
      files: at the entrance of stage `start`.
      sums: the moments wanted.
      calibration: says which windows are held out, and how many there are at a time.
      weights: of the tokens, as token_weights.relative makes them; or None.
      out: receives what stage `stop` - 1 made: inner where it opened one, otherwise x.
      float_block: of `step`.
    """
    wanted = token_weights.keys_of({name for name, _ in sums.fitted.inputs})
    wanted_states = {
        i for stage in crossed_stages(config, sums.fitted) for i in states(config, stage)
    }
    both = [spread.partial_sums(of) for of in sums]
    shared, products = spread.on_all((block, float_block)), calibration.model_products
    for part in window_batches(calibration):
        which = int(part.start >= calibration.num_windows)
        own = spread.mine(part)
        x = files.x[own]
        inner = None if files.inner is None else on_device(files.inner[own], products)
        reference = None
        if wanted_states:
            # Nothing aims at the windows held out: what stands in for their states is not read.
            read = (
                on_device(np.zeros_like(x) if which else file[own], products)
                if i in wanted_states
                else None
                for i, file in enumerate(files.reference)
            )
            reference = FloatStates(*read)
        of_part = None if weights is None else {n: jnp.asarray(weights[n][own]) for n in wanted}
        windows = on_device(x, products), inner, of_part, reference, spread.real(part)
        (x, inner), both[which] = spread.run(
            _step, (config, start, stop), shared, windows, both[which], part=part
        )
        if out is not None:
            out[own] = x if inner is None else inner
    fitted, held_out = map(spread.total, both)
    return Sums(fitted, held_out._replace(crosses={}))  # which nobody reads


def _step(static, shared, windows, sums):
    (config, start, stop), (block, float_block) = static, shared
    x, inner, weights, reference, real = windows
    *to_next, moments = step(
        config, block, x, inner, start, stop, sums, weights, reference, float_block, real
    )
    return tuple(to_next), moments


def with_judges(problem: Problem, judges: Sequence[Objective]) -> Problem:
    """The problem, whose objectives know the Hessians of `judges`; as it is without any."""
    if not judges:
        return problem
    pairs = zip(problem.objectives, judges, strict=True)
    return problem._replace(objectives=[own._replace(judge=other.hessian) for own, other in pairs])


def judges(
    config: ModelConfig,
    problem: Problem,
    hessians: Mapping[Owner, jax.Array],
    weights: Mapping[str, np.ndarray] | None,
    name: str,
) -> list[Objective]:
    """The objectives of a layer with the Hessians of the windows held out; none without any.

    Args:
      config: of the block.
      problem: of the layer.
      hessians: of these windows.
      weights: of the tokens, as `run_windows` takes them.
      name: of the layer.
    """
    if not hessians:
        return []
    return [
        objective._replace(hessian=hessians[owner])
        for owner, objective in zip(owners(config, name, weights), problem.objectives, strict=True)
    ]
