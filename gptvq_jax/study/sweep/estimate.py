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
from gptvq_jax.methods.trellis import TrellisSettings
from gptvq_jax.models import flops
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.head_chunk import head_chunk
from gptvq_jax.models.llama import LINEAR_GROUPS, LINEAR_LAYERS, STAGES
from gptvq_jax.models.source import layer_shapes
from gptvq_jax.moves.viterbi import TRACE_BACK
from gptvq_jax.run.curves import to_measure
from gptvq_jax.run.passes import peak_bytes
from gptvq_jax.run.quantize import num_quantized
from gptvq_jax.run.sizes import stored_bytes
from gptvq_jax.study.sweep.passes import FLOAT, GRADIENTS, Pass


def cell_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of a run that finds its passes over the float model made; a held-out text of unknown length
    is left out, and rounds that may stop early count in full."""
    c, blocks = settings.calibration, num_quantized(settings, config)
    shape = c.all_windows, c.seqlen
    walks = 1 if settings.true_sequential else 2
    size = walks * flops.block_forward(config, *shape)
    size += moments_flop(config, settings, c.asymmetry > 0)
    if c.asymmetry > 0:  # what the first layers of both halves read in the float model
        size += flops.stage_flops(config, (0, 2), *shape)
    groups = c.gradient_groups or 1
    used = _formats(settings)
    # Errors, also on what is held out, and the asymmetric target.
    units = 2 + 2 * (c.held_out > 0) + 3 * (c.asymmetry > 0)
    for rows, cols in layer_shapes(config).values():
        per_layer = [groups * method_flop(of, rows // groups, cols) for of in used]
        size += sum(per_layer) / len(per_layer) + units * unit(rows, cols)
    if settings.tune.block:
        size += settings.tune.epochs * flops.block_tuning(config, c.num_windows, c.seqlen)
    return blocks * size + evaluation_flop(config, settings)


def _formats(settings: RunSettings) -> list[Any]:
    """What a layer may be quantized with; a budget that fills columns is that of the mean layer."""
    budget = settings.allocation.bits_per_value
    if not budget:
        return [settings.method_settings]
    return settings.candidates or [
        dataclasses.replace(settings.method_settings, bits=min(budget, MAX_RATE))
    ]


OF_A_STEP = 5  # per window and row: a comparison; a difference, its weighted square, and a sum


def method_flop(settings: Any, rows: int, cols: int) -> float:
    """Of a layer (R, C) by a method with these settings, its Hessian factorized already."""
    return settings.flops(rows, cols) + OF_A_STEP * search_steps(settings, rows, cols)


def search_steps(settings: Any, rows: int, cols: int) -> int:
    """Windows that the search of trellis codes goes through in all rows and columns; else 0.

    That is 2^L for every weight in the sweep and in every pass of recoding, and around the cut of
    each stream before. Rates are counted as the whole bits nearest to their mean.
    """
    if not isinstance(settings, TrellisSettings):
        return 0
    stream_rows, bits = settings.rows_of_stream(rows), settings.window_bits
    rate = min(max(1, round(settings.bits)), settings.most_rate)
    around = min(2 * TRACE_BACK * -(-bits // rate), stream_rows)
    streams = -(-rows // stream_rows) * cols * (1 + settings.recode_passes)
    return streams * (stream_rows + around) * 2**bits


def pass_flop(config: ModelConfig, of: Pass) -> float:
    """Of a pass that cells share."""
    settings, depth = of.settings, config.num_hidden_layers
    shape = settings.calibration.all_windows, settings.calibration.seqlen
    blocks = num_quantized(settings, config)
    if of.kind == FLOAT:
        return of.points * flops.block_forward(config, *shape) + evaluation_flop(config, settings)
    if of.kind == GRADIENTS:
        chunk = head_chunk(config, settings.calibration.batch_size)
        size = flops.head_backward(config, *shape, chunk)
        size += depth * flops.block_backward(config, *shape)
        curves = settings.allocation.bits_per_value > 0
        return size + curves * blocks * _curves_flop(config, settings)
    of_block = flops.block_inputs(config, *shape) + moments_flop(config, settings, False)
    return blocks * of_block


def _curves_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of the error curves of a block."""
    groups, size = settings.calibration.gradient_groups or 1, moments_flop(config, settings, False)
    for rows, cols in layer_shapes(config).values():
        for candidate in to_measure(settings.candidates, settings.allocation.measured):
            quick = dataclasses.replace(candidate, polish_rounds=0)
            part = rows // groups
            if settings.allocation.sample:
                part = candidate.parts(rows // groups, cols)[0].rows
            size += groups * (quick.flops(part, cols) + 2 * unit(part, cols))
    return size


def moments_flop(config: ModelConfig, settings: RunSettings, crosses: bool) -> float:
    """Of the Hessians of a block and their factors."""
    c, shapes = settings.calibration, layer_shapes(config)
    tokens, groups, size = c.all_windows * c.seqlen, c.gradient_groups, 0.0
    for stage, group in enumerate(LINEAR_GROUPS):
        for name in group if groups else group[:1]:
            rows, cols = shapes[name]
            own = second_moment(tokens, cols, tile_size(cols)) + inverse_cholesky(cols)
            if crosses:
                closes = STAGES[stage] in ("attend", "feed")
                own += cross_moment(tokens, rows // (groups or 1) if closes else cols, cols)
            size += own * (groups or 1)
    return size


def evaluation_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of the perplexity of a model; 0 where the length of the text is not known."""
    shape = settings.evaluation.num_windows, settings.evaluation.seqlen
    blocks = config.num_hidden_layers * flops.block_forward(config, *shape)
    chunk = head_chunk(config, settings.evaluation.batch_size)
    return blocks + flops.head_forward(config, *shape, chunk)


def cell_bytes(config: ModelConfig, settings: RunSettings) -> tuple[int, int]:
    """Of a run: what stays on the disk, and what it takes for a while beside it."""
    shape = settings.calibration.all_windows, settings.calibration.seqlen
    while_it_runs = peak_bytes(config, settings, shape, 0, made=True)
    return stored_bytes(config, settings, _largest(config, settings)), while_it_runs


def _largest(config: ModelConfig, settings: RunSettings) -> dict[tuple[int, str], Any]:
    """A plan in which every layer has its largest candidate: more than a budget allows."""
    if not settings.allocation.bits_per_value:
        return {}
    largest = max(_formats(settings), key=lambda of: of.bits)
    blocks = range(num_quantized(settings, config))
    return {(index, name): largest for index in blocks for name in LINEAR_LAYERS}


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
