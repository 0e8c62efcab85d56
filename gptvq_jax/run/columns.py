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
import functools
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
from gptvq_jax.models.llama import Params, get_layer
from gptvq_jax.models.source import layer_shapes
from gptvq_jax.moves.excess import distortion
from gptvq_jax.moves.rates import water_fill
from gptvq_jax.rule_settings import is_open
from gptvq_jax.run.context import Context
from gptvq_jax.run.formats import layer_format, linear_layers, of_recipe
from gptvq_jax.run.sizes import dense_item, format_bytes

_ROW_BYTES = 200  # of a layer in a file of columns, at most, ...
_NUMBER_BYTES = 26  # ... and of one of its columns


def measure(
    context: Context,
    index: int,
    block: Params,
    objectives: Mapping[str, Sequence[Objective]],
    sensitivities: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    """One row for every layer of a block: what each of its columns adds to the loss at 0 bits.

    A layer whose bits a rule of a recipe has settled has one with its bytes instead.

    Arguments are those of `curves.measure`; layers have one row group.
    """
    settings = context.settings
    context.progress.note(f"block {index} columns")
    bits = _open_bits(settings, *_sizes(settings, context.source.config))
    rows = []
    for name in context.source.config.of_block(index).linear_layers:
        weight = jnp.asarray(get_layer(block, name)["kernel"]).T
        of = layer_format(settings, index, name)
        if not is_open(settings, of.rule):
            size = format_bytes(of, *weight.shape, dense_item(settings))
            rows.append({"layer": name, "shape": list(weight.shape), "settled_bytes": size})
            continue
        (objective,) = objectives[name]
        of_mean = _with_bits(of.settings, bits)
        most = of_mean.most_outliers(*weight.shape)
        of_layer = demand(weight, objective.factor.hinv_chol, of_mean, most)
        sensitivity = float(sensitivities[name].mean())
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
    return len(config.linear_layers) * _ROW_BYTES + inputs * _NUMBER_BYTES


def check_budget(config: ModelConfig, settings: RunSettings) -> None:
    """Checks, before any work, that scales and rates leave some of the budget.

    The budget is of all layers: what rules of a recipe have settled is a part of it.

    Raises:
      ValueError: they do not; the message names the bits per value that they take.
    """
    values, settled, _ = _sizes(settings, config)
    fixed, in_8_bits = 0, settings.trellis.form == INT8
    for layer, shape in linear_layers(settings, config).items():
        of, rule = layer_format(settings, *layer)[1:]
        if is_open(settings, rule):
            fixed += (of.budget_bytes if of.form == INT8 else of.fixed_bytes)(*shape)
    if 8 * (fixed + settled) > settings.allocation.bits_per_value * values:
        what = f"trellis.form={INT8} takes" if in_8_bits else "scales and rates alone take"
        raise ValueError(
            f"allocation.bits_per_value={settings.allocation.bits_per_value:g} cannot be met: "
            f"{what} {8 * (fixed + settled) / values:.4f} bits per value"
            f"{of_recipe(settled, values)}; raise it"
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
    rows = {layer: row for layer, (row,) in layers.items()}
    total = sum(math.prod(row["shape"]) for row in rows.values())
    settled = sum(row.get("settled_bytes", 0) for row in rows.values())
    open_rows = {layer: row for layer, row in rows.items() if "values" in row}
    chosen, in_8_bits = _kept_in_8_bits(settings, open_rows)
    measured = {layer: row for layer, row in open_rows.items() if layer not in chosen}
    of_layers = {
        layer: dataclasses.replace(layer_format(settings, *layer).settings, form=CODES)
        for layer in measured
    }
    shapes = [tuple(row["shape"]) for row in measured.values()]
    fixed = [
        of.fixed_bytes(*shape) + OUTLIER_BYTES * row["outliers"]
        for of, shape, row in zip(of_layers.values(), shapes, measured.values(), strict=True)
    ]
    budget = settings.allocation.bits_per_value * total / 8
    least = sum(fixed) + settled + in_8_bits
    if least > budget:
        kept = ", and of layers that are kept in 8 bits" if chosen else ""
        raise ValueError(
            f"allocation.bits_per_value={settings.allocation.bits_per_value:g} is below the "
            f"{8 * least / total:.4f} bits per value of scales, rates and outliers{kept}"
            f"{of_recipe(settled, total)}; raise it, or set trellis.outlier_limit=0"
            + (f" or trellis.form={CODES}" if chosen else "")
        )
    if not measured:
        return chosen
    per_bit = [
        of.bytes_per_bit(rows) for of, (rows, _) in zip(of_layers.values(), shapes, strict=True)
    ]
    widths = [cols for _, cols in shapes]
    rates = water_fill(
        np.concatenate([row["values"] for row in measured.values()]),
        np.repeat(per_bit, widths),
        budget - least,
        distortion(settings.trellis.window_bits),
    )
    of_columns = np.split(rates, np.cumsum(widths)[:-1])
    # A layer whose columns are all full would pass the most that one takes by its scales.
    chosen |= {
        layer: dataclasses.replace(
            of, bits=min(8 * (base + cost * int(own.sum())) / math.prod(shape), MAX_RATE)
        )
        for (layer, of), base, cost, own, shape in zip(
            of_layers.items(), fixed, per_bit, of_columns, shapes, strict=True
        )
    }
    bits = _open_bits(settings, total, settled, sum(map(math.prod, shapes)))
    for (block, name), row in measured.items():
        most = _with_bits(of_layers[block, name], bits).most_outliers(*row["shape"])
        if row["outliers"] and row["outliers"] >= most:
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


@functools.lru_cache(maxsize=1)  # every block asks
def _sizes(settings: RunSettings, config: ModelConfig) -> tuple[int, int, int]:
    """Of a model, what `_open_bits` takes."""
    values, settled, open_values = 0, 0, 0
    for layer, shape in linear_layers(settings, config).items():
        of = layer_format(settings, *layer)
        values += math.prod(shape)
        if is_open(settings, of.rule):
            open_values += math.prod(shape)
        else:
            settled += format_bytes(of, *shape, dense_item(settings))
    return values, settled, open_values


def _open_bits(settings: RunSettings, values: int, settled: int, open_values: int) -> float:
    """Bits per value that the budget leaves layers that no rule has settled.

    Args:
      settings: of the run.
      values: weights of all layers.
      settled: bytes of those that rules have settled.
      open_values: weights of the others.
    """
    budget = settings.allocation.bits_per_value
    return (budget * values - 8 * settled) / open_values if settled else budget


def _with_bits(of: TrellisSettings, bits: float) -> TrellisSettings:
    """Of a layer that gets so many bits."""
    return dataclasses.replace(of, bits=min(bits, MAX_RATE))
