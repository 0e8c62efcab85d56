"""Bits for every column of trellis codes, under a budget for all layers together.

With w_t the mean squared gradient of the loss with respect to a layer's outputs at token t, column
j at K bits raises the loss, to second order and up to a constant factor, by

    (mean_t w_t) v_j D(K),   v_j = sum_r W_rj^2 / U_jj^2

with U the factor of the Hessian that the layer is quantized with, outliers left out and D that of
moves/excess.py. So the bits of all columns are filled in one go, and no candidate is measured. What
a layer gets for all its columns is then its own budget, of which it finds its own outliers: what a
bit is worth there is what it is worth in all layers. A layer with more outliers than codes can have
is kept in 8 bits, and the others share what it leaves.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging

from gptvq_jax.config import RunSettings
from gptvq_jax.core.hessian import unit
from gptvq_jax.core.trellis_tensor import MAX_RATE
from gptvq_jax.methods.layer import Objective
from gptvq_jax.methods.trellis_budget import demand
from gptvq_jax.methods.trellis_settings import (
    CODES,
    INT8,
    MOST_OUTLIERS,
    OUTLIER_BYTES,
    TrellisSettings,
)
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import LINEAR_LAYERS, Params, get_layer
from gptvq_jax.models.source import layer_shapes
from gptvq_jax.moves.excess import distortion
from gptvq_jax.moves.rates import water_fill
from gptvq_jax.run.context import Context

_ROW_BYTES = 200  # of a layer in a file of columns, at most, ...
_NUMBER_BYTES = 26  # ... and of one of its columns


def measure(
    context: Context,
    index: int,
    block: Params,
    objectives: Mapping[str, Sequence[Objective]],
    token_weights: dict[str, np.ndarray],
) -> list[dict[str, Any]]:
    """One row for every layer of a block: what each of its columns adds to the loss at 0 bits.

    Arguments are those of `curves.measure`; layers have one row group.
    """
    settings = context.settings
    context.progress.note(f"block {index} columns")
    of_mean = _of_mean(settings)
    rows = []
    for name in LINEAR_LAYERS:
        (objective,) = objectives[name]
        hinv_chol = objective.factor.hinv_chol
        weight = jnp.asarray(get_layer(block, name)["kernel"]).T
        most = of_mean.most_outliers(*weight.shape)
        of_layer = demand(weight, hinv_chol, of_mean, most)
        sensitivity = float(token_weights[name].mean(dtype=np.float64))
        values = np.asarray(of_layer.values, np.float64) * sensitivity
        values *= float(unit(objective.hessian))
        rows.append({
            "layer": name,
            "shape": list(weight.shape),
            "outliers": int(jnp.sum(of_layer.counts)),
            "crowded": of_layer.crowded,
            "values": values.tolist(),
        })  # fmt: skip
    return rows


def block_bytes(config: ModelConfig, settings: RunSettings) -> int:
    """Most bytes of the file of what is measured of a block."""
    del settings
    inputs = sum(cols for _, cols in layer_shapes(config).values())
    return len(LINEAR_LAYERS) * _ROW_BYTES + inputs * _NUMBER_BYTES


def check_budget(config: ModelConfig, settings: RunSettings) -> None:
    """Checks, before any work, that scales and rates leave some of the budget.

    Raises:
      ValueError: they do not; the message names the bits per value that they take.
    """
    shapes, trellis = layer_shapes(config).values(), settings.trellis
    in_8_bits = trellis.form == INT8
    of_layer = trellis.budget_bytes if in_8_bits else trellis.fixed_bytes
    fixed = sum(of_layer(*shape) for shape in shapes)
    values = sum(rows * cols for rows, cols in shapes)
    if 8 * fixed > settings.allocation.bits_per_value * values:
        what = f"trellis.form={INT8} takes" if in_8_bits else "scales and rates alone take"
        raise ValueError(
            f"allocation.bits_per_value={settings.allocation.bits_per_value:g} cannot be met: "
            f"{what} {8 * fixed / values:.4f} bits per value; raise it"
        )


def plan(
    settings: RunSettings, layers: Mapping[tuple[int, str], Sequence[Mapping[str, Any]]]
) -> dict[tuple[int, str], TrellisSettings]:
    """Settings with its own budget for every layer.

    Args:
      settings: of the run.
      layers: rows of `measure`, by (block, layer): one each.

    Raises:
      ValueError: scales, rates and outliers take more than the budget.
    """
    trellis = dataclasses.replace(settings.trellis, form=CODES)
    every = {layer: row for layer, (row,) in layers.items()}
    values = sum(math.prod(row["shape"]) for row in every.values())
    chosen, in_8_bits = _kept_in_8_bits(settings, every)
    measured = {layer: row for layer, row in every.items() if layer not in chosen}
    shapes = [tuple(row["shape"]) for row in measured.values()]
    sizes = [rows * cols for rows, cols in shapes]
    fixed = [
        trellis.fixed_bytes(*shape) + OUTLIER_BYTES * row["outliers"]
        for shape, row in zip(shapes, measured.values(), strict=True)
    ]
    budget = settings.allocation.bits_per_value * values / 8 - in_8_bits
    if sum(fixed) > budget:
        kept = ", and of layers that are kept in 8 bits" if chosen else ""
        raise ValueError(
            f"allocation.bits_per_value={settings.allocation.bits_per_value:g} is below the "
            f"{8 * (sum(fixed) + in_8_bits) / values:.4f} bits per value of scales, rates and "
            f"outliers{kept}; raise it, or set trellis.outlier_limit=0"
            + (f" or trellis.form={CODES}" if chosen else "")
        )
    if not measured:
        return chosen
    per_bit = [trellis.bytes_per_bit(rows) for rows, _ in shapes]
    widths = [cols for _, cols in shapes]
    rates = water_fill(
        np.concatenate([row["values"] for row in measured.values()]),
        np.repeat(per_bit, widths),
        budget - sum(fixed),
        distortion(trellis.window_bits),
    )
    of_layer = np.split(rates, np.cumsum(widths)[:-1])
    # A layer whose columns are all full would pass the most that one takes by its scales.
    chosen |= {
        layer: dataclasses.replace(
            trellis, bits=min(8 * (base + cost * int(own.sum())) / size, MAX_RATE)
        )
        for layer, base, cost, own, size in zip(
            measured, fixed, per_bit, of_layer, sizes, strict=True
        )
    }
    of_mean = _of_mean(settings)
    for (block, name), row in measured.items():
        if row["outliers"] and row["outliers"] >= of_mean.most_outliers(*row["shape"]):
            logging.warning(
                "layers_%d/%s has more outliers than the %d that are kept beside codes; it gets "
                "%.3f bits per value instead",
                block,
                name,
                row["outliers"],
                chosen[block, name].bits,
            )
    return chosen


def _kept_in_8_bits(
    settings: RunSettings, measured: Mapping[tuple[int, str], Mapping[str, Any]]
) -> tuple[dict[tuple[int, str], TrellisSettings], int]:
    """Settings of the layers that are not coded, and their bytes; says which they are."""
    whole = dataclasses.replace(settings.trellis, form=INT8)
    every = settings.trellis.form == INT8
    chosen, num_bytes = {}, 0
    for (block, name), row in measured.items():
        if not (every or row.get("crowded")):
            continue
        own = whole.budget_bytes(*row["shape"])
        chosen[block, name] = whole
        num_bytes += own
        if not every:
            logging.warning(
                "layers_%d/%s has more outliers than the %g %% of its weights that codes can have; "
                "it is kept in 8 bits, %.3f bits per value, and the others share what it leaves of "
                "allocation.bits_per_value",
                block,
                name,
                100 * MOST_OUTLIERS,
                8 * own / math.prod(row["shape"]),
            )
    return chosen, num_bytes


def _of_mean(settings: RunSettings) -> TrellisSettings:
    """Of a layer that gets the mean bits."""
    bits = min(settings.allocation.bits_per_value, MAX_RATE)
    return dataclasses.replace(settings.trellis, bits=bits)
