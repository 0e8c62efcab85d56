"""Index bits and dimension for each layer, under a budget for the whole model.

What the model's loss would rise by with each candidate (curves.py) adds up over the layers: the
best allocation is a knapsack, solved exactly (knapsack.py).
"""

from typing import Any

from absl import logging

from gptvq_jax.config import RunSettings
from gptvq_jax.core import knapsack
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import LINEAR_LAYERS
from gptvq_jax.models.source import layer_shapes
from gptvq_jax.run.quantize import Plan
from gptvq_jax.run.sizes import packed_bytes
from gptvq_jax.run.workdir import WorkDir

_ROW_BYTES = 200  # of one candidate in a file of curves, at most


def curve_bytes(num_blocks: int, num_rows: int) -> int:
    """Most bytes of the files of curves.

    Args:
      num_blocks: blocks to measure.
      num_rows: candidates of a layer.
    """
    return num_blocks * len(LINEAR_LAYERS) * num_rows * _ROW_BYTES


def check_budget(config: ModelConfig, settings: RunSettings) -> None:
    """Checks, before any work, that the smallest candidates are within the budget.

    Says so where the largest ones leave some of it: every layer gets these, whatever the budget.

    Raises:
      ValueError: they are not; the message names the bits per value that they take.
    """
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
    curves: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for index in range(num_blocks):
        for row in workdir.load_curves(index):
            curves.setdefault((index, row["layer"]), []).append(row)
    values = sum(rows[0]["num_values"] for rows in curves.values())
    chosen = knapsack.choose(
        [[row["loss"] for row in rows] for rows in curves.values()],
        [[row["num_bytes"] for row in rows] for rows in curves.values()],
        int(settings.allocation.bits_per_value * values / 8),
    )
    return {layer: settings.candidates[k] for layer, k in zip(curves, chosen, strict=True)}
