"""Index bits and dimension for each layer, under a budget for the whole model.

What the model's loss would rise by with each candidate (curves.py) adds up over the layers: the
best allocation is a knapsack, solved exactly (knapsack.py). Columns of trellis codes, whose rise is
known in closed form, are filled bit by bit instead (columns.py).
"""

from typing import Any

import numpy as np
from absl import logging

from gptvq_jax.config import RunSettings
from gptvq_jax.core import knapsack
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import LINEAR_LAYERS, Params
from gptvq_jax.models.source import layer_shapes
from gptvq_jax.run import columns, curves
from gptvq_jax.run.calibrate import Moments, factor_flops, objectives, owners
from gptvq_jax.run.context import Context
from gptvq_jax.run.packed_block import Plan
from gptvq_jax.run.sizes import packed_bytes
from gptvq_jax.run.workdir import WorkDir

_ROW_BYTES = 200  # of one candidate in a file of curves, at most
_NUMBER_BYTES = 26  # of one column there


def curve_bytes(config: ModelConfig, settings: RunSettings, num_blocks: int) -> int:
    """Most bytes of the files of curves of so many blocks."""
    if settings.method == "trellis":
        inputs = sum(cols for _, cols in layer_shapes(config).values())
        return num_blocks * (len(LINEAR_LAYERS) * _ROW_BYTES + inputs * _NUMBER_BYTES)
    return num_blocks * len(LINEAR_LAYERS) * len(settings.candidates) * _ROW_BYTES


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
      token_weights: {layer: (n, T, g)}, squared gradients.
    """
    settings = context.settings
    weighted = token_weights if settings.calibration.gradient_groups else None
    context.progress.note(f"block {index} Hessians")
    found = objectives(moments, settings.damping, f"layers_{index}")
    context.stopwatch.flops(factor_flops(moments))
    of_layers = {name: [found[o] for o in owners(name, weighted)] for name in LINEAR_LAYERS}
    of_method = columns if settings.method == "trellis" else curves
    return of_method.measure(context, index, block, of_layers, token_weights)


def check_budget(config: ModelConfig, settings: RunSettings) -> None:
    """Checks, before any work, that the smallest candidates are within the budget.

    Says so where the largest ones leave some of it: every layer gets these, whatever the budget.

    Raises:
      ValueError: they are not; the message names the bits per value that they take.
    """
    if settings.method == "trellis":
        columns.check_budget(config, settings)
        return
    groups = settings.calibration.gradient_groups or 1
    fewest, most, values = 0, 0, 0
    for rows, cols in layer_shapes(config).values():
        sizes = [
            packed_bytes(settings.method, candidate, rows, cols, groups)
            for candidate in settings.candidates
        ]
        fewest += min(sizes)
        most += max(sizes)
        values += rows * cols
    if 8 * fewest > settings.allocation.bits_per_value * values:
        raise ValueError(
            f"allocation.bits_per_value={settings.allocation.bits_per_value:g} cannot be met: the "
            f"smallest candidates take {8 * fewest / values:.4f} bits per value; raise it, or add "
            "smaller ones to allocation.bits"
        )
    if 8 * most < settings.allocation.bits_per_value * values:
        logging.warning(
            "allocation.bits_per_value=%g is not used up: the largest candidates take %.4f bits "
            "per value, so every layer gets its best one; add larger ones to allocation.bits",
            settings.allocation.bits_per_value,
            8 * most / values,
        )


def plan(settings: RunSettings, workdir: WorkDir, num_blocks: int) -> Plan:
    """Settings for every layer of the measured blocks: the least estimated rise of the loss."""
    curves_of: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for index in range(num_blocks):
        for row in workdir.load_curves(index):
            curves_of.setdefault((index, row["layer"]), []).append(row)
    if settings.method == "trellis":
        return columns.plan(settings, {layer: row for layer, (row,) in curves_of.items()})
    values = sum(rows[0]["num_values"] for rows in curves_of.values())
    chosen = knapsack.choose(
        [[row["loss"] for row in rows] for rows in curves_of.values()],
        [[row["num_bytes"] for row in rows] for rows in curves_of.values()],
        int(settings.allocation.bits_per_value * values / 8),
    )
    return {layer: settings.candidates[k] for layer, k in zip(curves_of, chosen, strict=True)}
