"""Bits for each layer, under a budget for the whole model.

A method has candidates for a layer, of which one is chosen (candidates.py), or fills all columns of
all layers bit by bit (columns.py). Both measure blocks of the float model, and plan from that.
"""

from types import ModuleType
from typing import Any

import numpy as np

from gptvq_jax.config import RunSettings
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import Params
from gptvq_jax.run import candidates, columns
from gptvq_jax.run.calibrate import Moments, owners
from gptvq_jax.run.context import Context
from gptvq_jax.run.formats import Plan
from gptvq_jax.run.objectives import expert_shares, factor_flops, objectives
from gptvq_jax.run.token_weights import means as layer_means
from gptvq_jax.run.workdir import WorkDir


def curve_bytes(config: ModelConfig, settings: RunSettings, num_blocks: int) -> int:
    """Most bytes of the files of curves of so many blocks."""
    if not num_blocks:
        return 0
    counts, way = config.block_counts(num_blocks).items(), _way(settings)
    return sum(count * way.block_bytes(block, settings) for block, count in counts)


def measure(
    context: Context,
    index: int,
    block: Params,
    moments: Moments,
    token_weights: dict[str, np.ndarray],
) -> list[dict[str, Any]]:
    """What the plan needs to know of a block's layers, to be saved: one row or more for each.

    Args:
      context: of the run.
      index: of the block.
      block: parameters of the float model.
      moments: of what its layers read there.
      token_weights: squared gradients, as token_weights.py has them.
    """
    settings = context.settings
    weighted = token_weights if settings.calibration.gradient_groups else None
    context.progress.note(f"block {index} Hessians")
    least = settings.calibration.expert_tokens
    found = objectives(moments, settings.damping, f"layers_{index}", least)
    context.stopwatch.flops(factor_flops(moments))
    config = context.source.config.of_block(index)
    of_layers = {
        name: [found[o] for o in owners(config, name, weighted)] for name in config.linear_layers
    }
    part = expert_shares(moments, least)
    means = {}
    for name in config.linear_layers:
        share = part.get(owners(config, name, weighted)[0], 0.0)
        means[name] = layer_means(config, token_weights, name, share)
    return _way(settings).measure(context, index, block, of_layers, means)


def check_budget(config: ModelConfig, settings: RunSettings) -> None:
    """Checks, before any work, that the least that layers can take is within the budget.

    Raises:
      ValueError: it is not; the message names the bits per value that they take.
    """
    _way(settings).check_budget(config, settings)


def plan(settings: RunSettings, workdir: WorkDir, num_blocks: int) -> Plan:
    """Settings for every layer of the measured blocks: the least estimated rise of the loss."""
    measured: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for index in range(num_blocks):
        for row in workdir.load_curves(index):
            measured.setdefault((index, row["layer"]), []).append(row)
    return _way(settings).plan(settings, measured)


def _way(settings: RunSettings) -> ModuleType:
    """How bits are allocated with a method, as its entry in METHODS says."""
    return {"candidates": candidates, "columns": columns}[METHODS[settings.method].allocation]
