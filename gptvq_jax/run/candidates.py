"""One of a few formats for each layer, under a budget for the whole model: a knapsack.

What the model's loss would rise by with each candidate (curves.py) adds up over the layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from gptvq_jax.config import RunSettings
from gptvq_jax.core import knapsack
from gptvq_jax.methods.gptvq_settings import GPTVQSettings
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.rule_settings import choices, is_open
from gptvq_jax.run.curves import measure
from gptvq_jax.run.formats import layer_format, linear_layers, of_recipe
from gptvq_jax.run.sizes import dense_item, format_bytes, packed_bytes

__all__ = ["block_bytes", "check_budget", "measure", "plan"]
_ROW_BYTES = 200  # of one candidate in a file of curves, at most


def block_bytes(config: ModelConfig, settings: RunSettings) -> int:
    """Most bytes of the file of curves of a block with this config."""
    return len(config.linear_layers) * len(settings.candidates) * _ROW_BYTES


def check_budget(config: ModelConfig, settings: RunSettings) -> None:
    """Checks, before any work, that the smallest candidates are within the budget.

    The budget is of all layers: what rules of a recipe have settled is a part of it.

    Says so where the largest ones leave some of it: every layer gets these, whatever the budget.

    Raises:
      ValueError: they are not; the message names the bits per value that they take.
    """
    groups = settings.calibration.gradient_groups or 1
    fewest, most, values, settled = 0, 0, 0, 0
    for layer, (rows, cols) in linear_layers(settings, config).items():
        of = layer_format(settings, *layer)
        values += rows * cols
        if not is_open(settings, of.rule):
            settled += format_bytes(of, rows, cols, dense_item(settings), groups)
            continue
        sizes = [
            packed_bytes(settings.method, candidate, rows, cols, groups)
            for candidate in choices(settings, of.rule)
        ]
        fewest += min(sizes)
        most += max(sizes)
    fewest, most = fewest + settled, most + settled
    if 8 * fewest > settings.allocation.bits_per_value * values:
        raise ValueError(
            f"allocation.bits_per_value={settings.allocation.bits_per_value:g} cannot be met: the "
            f"smallest candidates take {8 * fewest / values:.4f} bits per value"
            f"{of_recipe(settled, values)}; raise it, or add smaller ones to allocation.bits"
        )
    if 8 * most < settings.allocation.bits_per_value * values:
        logging.warning(
            "allocation.bits_per_value=%g is not used up: the largest candidates take %.4f bits "
            "per value, so every layer gets its best one; add larger ones to allocation.bits",
            settings.allocation.bits_per_value,
            8 * most / values,
        )


def plan(
    settings: RunSettings, layers: Mapping[tuple[int, str], Sequence[Mapping[str, Any]]]
) -> dict[tuple[int, str], GPTVQSettings]:
    """Settings for every layer: the least estimated rise of the loss.

    Args:
      settings: of the run.
      layers: rows of `measure`, by (block, layer).
    """
    values = sum(rows[0]["num_values"] for rows in layers.values())
    chosen = knapsack.choose(
        [[row["loss"] for row in rows] for rows in layers.values()],
        [[row["num_bytes"] for row in rows] for rows in layers.values()],
        int(settings.allocation.bits_per_value * values / 8),
    )
    plan = {}
    for layer, k in zip(layers, chosen, strict=True):
        rule = layer_format(settings, *layer).rule
        if is_open(settings, rule):  # otherwise its one row says what a rule has settled
            plan[layer] = choices(settings, rule)[k]
    return plan
