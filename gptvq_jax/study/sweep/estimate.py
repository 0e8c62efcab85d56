"""What a sweep will take, from shapes: FLOP, and bytes on the disk.

FLOP are those of matrix products and of the search of trellis codes, which is most of their work.

Seconds follow from a rate: of this machine's matrix products, as a lower bound, or, once cells are
finished, of those cells as they were.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gptvq_jax.config import RunSettings
from gptvq_jax.core.flops import cross_moment, inverse_cholesky, second_moment, unit
from gptvq_jax.core.hessian import tile_size
from gptvq_jax.core.trellis_tensor import MAX_RATE
from gptvq_jax.methods.trellis_settings import INT8 as IN_8_BITS
from gptvq_jax.methods.trellis_settings import TrellisSettings
from gptvq_jax.models import flops
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.head_chunk import head_chunk
from gptvq_jax.models.source import layer_shapes
from gptvq_jax.models.stages import expert_of
from gptvq_jax.moves.viterbi import TRACE_BACK
from gptvq_jax.rule_settings import Format, choices, is_open
from gptvq_jax.rules import DENSE, INT8
from gptvq_jax.run.calibrate import closes
from gptvq_jax.run.curves import to_measure
from gptvq_jax.run.formats import (
    layer_format,
    linear_layers,
    num_quantized,
    outer_formats,
    outer_matrices,
)
from gptvq_jax.run.passes import peak_bytes
from gptvq_jax.run.sizes import stored_bytes
from gptvq_jax.study.sweep.passes import FLOAT, GRADIENTS, Pass


def cell_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of a run that finds its passes over the float model made; a held-out text of unknown length
    is left out, and rounds that may stop early count in full."""
    blocks = config.block_counts(num_quantized(settings, config)).items()
    size = sum(count * _block_flop(block, settings) for block, count in blocks)
    groups = settings.calibration.gradient_groups or 1
    for layer, (rows, cols) in linear_layers(settings, config).items():
        used = _formats(settings, layer_format(settings, *layer))
        per_layer = [groups * method_flop(of, rows // groups, cols) for of in used]
        size += sum(per_layer) / max(len(per_layer), 1)
    matrices = outer_matrices(config)
    for name, of in outer_formats(settings, config).items():
        if of.method not in (DENSE, INT8):
            size += method_flop(of.settings, *matrices[name])
    if settings.tune.model:
        size += _tuning_flop(config, settings)
    return size + evaluation_flop(config, settings)


def _tuning_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of tuning the whole model, if it does not stop early, and of the float model before that."""
    f, time = settings.finetune, settings.calibration.seqlen
    parts = f.steps * f.batch_size // f.micro_batch
    before = flops.blocks_forward(config, f.num_windows + f.held_out, time)
    return before + parts * flops.model_tuning(config, f.micro_batch, time)


def _block_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of a block with this config, but for what quantizes its layers."""
    c = settings.calibration
    shape = c.all_windows, c.seqlen
    walks = 1 if settings.true_sequential else 2
    size = walks * flops.block_forward(config, *shape)
    size += moments_flop(config, settings, c.asymmetry > 0)
    if c.asymmetry > 0:  # what the first layers of both halves read in the float model
        size += flops.stage_flops(config, (0, 2), *shape)
    # Errors, also on what is held out, and the asymmetric target.
    units = 2 + 2 * (c.held_out > 0) + 3 * (c.asymmetry > 0)
    size += units * sum(unit(*shape) for shape in layer_shapes(config).values())
    if settings.tune.block:
        size += settings.tune.epochs * flops.block_tuning(config, c.num_windows, c.seqlen)
    return size


def _formats(settings: RunSettings, of: Format) -> list[Any]:
    """What a layer may be quantized with, nothing where it stays dense.

    A budget that fills columns is that of the mean layer.
    """
    budget = settings.allocation.bits_per_value
    if not budget or not is_open(settings, of.rule):
        return [of.settings] if of.coder else []
    return choices(settings, of.rule) or [
        dataclasses.replace(of.settings, bits=min(budget, MAX_RATE))
    ]


OF_A_STEP = 5  # per window and row: a comparison; a difference, its weighted square, and a sum


def method_flop(settings: Any, rows: int, cols: int) -> float:
    """Of a layer (R, C) by a method with these settings, its Hessian factorized already."""
    return settings.flops(rows, cols) + OF_A_STEP * search_steps(settings, rows, cols)


def search_steps(settings: Any, rows: int, cols: int) -> int:
    """Windows that the search of trellis codes goes through in all rows and columns; else 0.

    That is 2^L for every weight in the sweep and in every pass of recoding, and around the cut of
    each stream before the first. Rates are counted as the whole bits nearest to their mean.
    """
    if not isinstance(settings, TrellisSettings) or settings.form == IN_8_BITS:
        return 0
    stream_rows, bits = settings.rows_of_stream(rows), settings.window_bits
    rate = min(max(1, round(settings.bits)), settings.most_rate)
    around = min(2 * TRACE_BACK * -(-bits // rate), stream_rows)
    streams = -(-rows // stream_rows) * cols
    return streams * ((1 + settings.recode_passes) * stream_rows + around) * 2**bits


def pass_flop(config: ModelConfig, of: Pass) -> float:
    """Of a pass that cells share."""
    settings = of.settings
    shape = settings.calibration.all_windows, settings.calibration.seqlen
    blocks = num_quantized(settings, config)
    if of.kind == FLOAT:
        points = config.block_counts(of.points).items()
        size = sum(count * flops.block_forward(block, *shape) for block, count in points)
        return size + evaluation_flop(config, settings)
    quantized = config.block_counts(blocks).items()
    if of.kind == GRADIENTS:
        chunk = head_chunk(config, settings.calibration.batch_size)
        every = config.block_counts().items()
        size = sum(count * flops.block_backward(block, *shape) for block, count in every)
        size += flops.head_backward(config, *shape, chunk)
        if settings.allocation.bits_per_value > 0:
            size += sum(count * moments_flop(block, settings, False) for block, count in quantized)
            size += _curves_flop(config, settings)
        return size
    return sum(
        count * (flops.block_inputs(block, *shape) + moments_flop(block, settings, False))
        for block, count in quantized
    )


def _curves_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of the error curves of all blocks, but for their Hessians."""
    groups, size = settings.calibration.gradient_groups or 1, 0.0
    for layer, (rows, cols) in linear_layers(settings, config).items():
        rule = layer_format(settings, *layer).rule
        of_layer = choices(settings, rule) if is_open(settings, rule) else []
        for candidate in to_measure(of_layer, settings.allocation.measured):
            quick = dataclasses.replace(candidate, polish_rounds=0)
            part = rows // groups
            if settings.allocation.sample:
                part = candidate.parts(rows // groups, cols)[0].rows
            size += groups * (quick.flops(part, cols) + 2 * unit(part, cols))
    return size


def moments_flop(config: ModelConfig, settings: RunSettings, crosses: bool) -> float:
    """Of the Hessians of a block and their factors."""
    c, shapes = settings.calibration, layer_shapes(config)
    groups, size = c.gradient_groups, 0.0
    for group in config.linear_groups:
        for name in group if groups else group[:1]:
            (rows, cols), tokens = shapes[name], c.all_windows * c.seqlen
            if expert_of(name) is not None:
                tokens = tokens * config.experts_per_token // config.experts
            own = second_moment(tokens, cols, tile_size(cols)) + inverse_cholesky(cols)
            if crosses:
                closing = closes(config, config.layers.stage_of[name])
                own += cross_moment(tokens, rows // (groups or 1) if closing else cols, cols)
            size += own * (groups or 1)
    return size


def evaluation_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of the perplexity of a model; 0 where the length of the text is not known."""
    shape = settings.evaluation.num_windows, settings.evaluation.seqlen
    chunk = head_chunk(config, settings.evaluation.batch_size)
    return flops.blocks_forward(config, *shape) + flops.head_forward(config, *shape, chunk)


def cell_bytes(config: ModelConfig, settings: RunSettings) -> tuple[int, int]:
    """Of a run: what stays on the disk, and what it takes for a while beside it."""
    shape = settings.calibration.all_windows, settings.calibration.seqlen
    while_it_runs = peak_bytes(config, settings, shape, 0, made=True)
    return stored_bytes(config, settings, _largest(config, settings)), while_it_runs


def _largest(config: ModelConfig, settings: RunSettings) -> dict[tuple[int, str], Any]:
    """A plan in which every layer has its largest candidate: more than a budget allows."""
    if not settings.allocation.bits_per_value:
        return {}
    largest = {}
    for layer in linear_layers(settings, config):
        of = layer_format(settings, *layer)
        if is_open(settings, of.rule):
            largest[layer] = max(_formats(settings, of), key=lambda settings: settings.bits)
    return largest


class Seconds(NamedTuple):
    """Of what is left of a sweep."""

    value: float
    basis: str  # where that comes from
    at_least: bool = False  # whether it is a bound from below


def seconds(
    flop: Mapping[str, float],
    left: Sequence[str],
    passes: float,
    rows: Mapping[str, Mapping[str, Any]],
    rate: Callable[[], float],
) -> Seconds:
    """How long the cells that are left will take.

    Args:
      flop: of every cell.
      left: names of cells.
      passes: FLOP of the passes that are left.
      rows: of finished cells, by name.
      rate: measures the FLOP/s of this machine's matrix products; called only where no cell is
        finished.
    """
    wanted = math.fsum(flop[name] for name in left) + passes
    if not wanted:
        return Seconds(0.0, "nothing is left")
    known = {name: float(row["seconds"]) for name, row in rows.items() if flop.get(name)}
    if known and sum(known.values()) > 0:
        per_flop = sum(known.values()) / sum(flop[name] for name in known)
        return Seconds(wanted * per_flop, f"as {len(known)} finished cells took")
    best = rate()
    basis = f"its arithmetic alone, at {best / 1e12:.2f} TFLOP/s, which this machine reaches"
    return Seconds(wanted / best, basis, at_least=True)
