"""How much the model's loss would rise with each candidate for a layer: its error curve.

With w_t the mean squared gradient of the loss with respect to the outputs of a row group at token
t, the rise is to second order and up to a constant factor

    rise = sum over row groups of (mean_t w_t) tr((W - Q) H (W - Q)^T)

where H is the Hessian that the layer is quantized with, weighted by gradients or not. Layers are
quantized as they are in the float model, without polish, with a few of the candidates: the
logarithm of the error is a smooth function of the bits, so that those between lie on a parabola.
It takes a sample of a layer's rows, and a Hessian of a sample of the windows.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.config import RunSettings
from gptvq_jax.core import flops
from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.quantized_tensor import dequantize_compiled
from gptvq_jax.methods.gptvq_settings import GPTVQSettings
from gptvq_jax.methods.layer import (
    Objective,
    Problem,
    losses,
    most_flops,
    quantize_layers,
    row_groups,
)
from gptvq_jax.methods.pool import parallel
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import Params, get_layer
from gptvq_jax.models.source import layer_shapes
from gptvq_jax.models.stages import expert_of
from gptvq_jax.rule_settings import choices, is_open
from gptvq_jax.run.context import Context
from gptvq_jax.run.formats import layer_format
from gptvq_jax.run.sizes import dense_item, format_bytes, packed_bytes


def measure(
    context: Context,
    index: int,
    block: Params,
    objectives: Mapping[str, Sequence[Objective]],
    sensitivities: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    """One row for every layer of a block and every candidate.

    A layer whose format a rule of a recipe has settled has one, with its bytes, not measured.

    Args:
      context: of the run.
      index: of the block.
      block: parameters of the float model.
      objectives: of each layer's row groups there.
      sensitivities: {layer: (g,)}, means of the squared gradients, over the fitted tokens.
    """
    settings = context.settings
    problems: list[Problem] = []
    scales: list[np.ndarray] = []  # of the losses, from the rows that were taken to all of them
    names = context.source.config.of_block(index).linear_layers
    rules = {name: layer_format(settings, index, name).rule for name in names}
    for name in (name for name in names if is_open(settings, rules[name])):
        weight = jnp.asarray(get_layer(block, name)["kernel"]).T
        of_layer = objectives[name]
        whole = _sizes(weight, of_layer)
        for candidate in to_measure(choices(settings, rules[name]), settings.allocation.measured):
            quick = dataclasses.replace(
                candidate, em_iterations=settings.allocation.em_iterations, polish_rounds=0
            )
            part, grid = weight, None
            if settings.allocation.sample:
                part, grid = sample_rows(weight, len(of_layer), candidate)
            key = jax.random.key(settings.seed)
            quantize = METHODS[settings.method].quantize
            problems.append(
                Problem(quantize, quick, part, of_layer, key, name=name, part_grid=grid)
            )
            taken = _sizes(part, of_layer)
            scales.append(np.divide(whole, taken, out=np.ones_like(whole), where=taken > 0))
    context.progress.note(f"block {index} error curves")
    tensors = quantize_layers(problems)

    def loss_of(number: int) -> float:
        problem = problems[number]
        quantized = dequantize_compiled(tensors[number])
        parts = np.multiply(losses(problem.weight, quantized, problem.objectives), scales[number])
        return float(np.dot(np.broadcast_to(sensitivities[problem.name], parts.shape), parts))

    sizes = (most_flops(p) + flops.unit(*p.weight.shape) for p in problems)
    context.stopwatch.flops(sum(sizes))
    measured: dict[str, list[tuple[GPTVQSettings, float]]] = {}
    for problem, loss in zip(problems, parallel(loss_of, range(len(problems))), strict=True):
        measured.setdefault(problem.name, []).append((problem.settings, loss))
    rows = (_rows(context, index, block, name, measured.get(name)) for name in names)
    return [row for of_layer in rows for row in of_layer]


def _rows(context, index, block, name, measured) -> list[dict[str, Any]]:
    """What is saved of a layer: every candidate, its loss measured or on the curve, its bytes."""
    settings = context.settings
    cols, rows = get_layer(block, name)["kernel"].shape
    groups = settings.calibration.gradient_groups or 1
    of = layer_format(settings, index, name)
    if measured is None:
        size = format_bytes(of, rows, cols, dense_item(settings), groups)
        settled = {"layer": name, "loss": 0.0, "measured": False}
        return [{**settled, "num_bytes": size, "num_values": rows * cols}]
    table = []
    for candidate in choices(settings, of.rule):
        points = [(s.bits, loss) for s, loss in measured if s.dim == candidate.dim]
        bits, values = zip(*points, strict=True)
        own = candidate.bits in bits
        loss = (
            values[bits.index(candidate.bits)] if own else interpolate(bits, values, candidate.bits)
        )
        table.append({
            "layer": name,
            "dim": candidate.dim,
            "bits": candidate.bits,
            "loss": loss,
            "measured": own,
            "num_bytes": packed_bytes(settings.method, candidate, rows, cols, groups),
            "num_values": rows * cols,
        })  # fmt: skip
    return table


def num_windows(settings: RunSettings, config: ModelConfig, shape: tuple[int, ...]) -> int:
    """How many of the fitted windows, from the first, are seen by the Hessians of the curves.

    Of a sample a quarter, at least so many that they have twice the tokens of a layer's inputs, and
    an expert on average too.

    Args:
      settings: of the run.
      config: of the block.
      shape: of the tokens (n, T).
    """
    count, time = shape[:2]
    if not settings.allocation.sample:
        return count
    widest = max(
        cols if expert_of(name) is None else cols * config.experts / config.experts_per_token
        for name, (_, cols) in layer_shapes(config).items()
    )
    return min(count, max(math.ceil(count / 4), math.ceil(2 * widest / time)))


def to_measure(candidates: Sequence[GPTVQSettings], count: int) -> list[GPTVQSettings]:
    """Of each dimension `count` candidates, spread evenly over the bits; 0: all."""
    chosen = []
    for dim in dict.fromkeys(c.dim for c in candidates):
        of_dim = sorted((c for c in candidates if c.dim == dim), key=lambda c: c.bits)
        if 0 < count < len(of_dim):
            spread = np.linspace(0, len(of_dim) - 1, count)
            of_dim = [of_dim[int(position)] for position in np.round(spread)]
        chosen += of_dim
    return chosen


def interpolate(bits: Sequence[float], losses: Sequence[float], at: float) -> float:
    """The loss at some bits, its logarithm a polynomial through those measured.

    Args:
      bits, losses: of 1 to 3 points.
      at: bits.
    """
    smallest = np.finfo(np.float64).tiny
    logs = np.log(np.maximum(losses, smallest))
    weights = [
        np.prod([(at - other) / (own - other) for other in bits if other != own]) for own in bits
    ]
    return float(np.exp(np.dot(weights, logs)))


def sample_rows(
    weight: jax.Array, groups: int, settings: GPTVQSettings
) -> tuple[jax.Array, GroupGrid]:
    """Evenly spaced rows of each row group, as many as are quantized by themselves.

    Args:
      weight: (R, C).
      groups: g, of R / g rows.
      settings: whose `parts` says how many.

    Returns:
      The rows (g * r, C), and the grid of r of them.
    """
    rows, cols = weight.shape
    grid, _ = settings.parts(rows // groups, cols)
    chosen = np.round(np.linspace(0, rows // groups - 1, grid.rows)).astype(int)
    return weight.reshape(groups, -1, cols)[:, chosen].reshape(-1, cols), grid


def _sizes(weight: jax.Array, objectives: Sequence[Objective]) -> np.ndarray:
    """By row group, sum_rc W_rc^2 H_cc, in float64."""
    sizes = []
    for rows, objective in zip(row_groups(weight, len(objectives)), objectives, strict=True):
        diagonal = np.asarray(jnp.diagonal(objective.hessian), np.float64)
        sizes.append(np.square(np.asarray(rows, np.float64)).sum(axis=0) @ diagonal)
    return np.array(sizes)
