"""What a run will compute, from shapes: FLOP of matrix products by stage, as the stopwatch counts.

Stages have the stopwatch's names. Rounds that may stop early count in full, and so do epochs; a
layer whose bits a budget chooses counts as the mean of its candidates. Searches of trellis codes,
which are no products, are counted apart. tests/run/test_work.py compares with what runs count.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

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
from gptvq_jax.models.stages import STAGES, expert_of
from gptvq_jax.moves.viterbi import TRACE_BACK
from gptvq_jax.rule_settings import Format, choices, is_open
from gptvq_jax.rules import DENSE, INT8
from gptvq_jax.run.calibrate import closes, opens_again, window_batches
from gptvq_jax.run.compare import pair_chunk
from gptvq_jax.run.curves import num_windows, to_measure
from gptvq_jax.run.formats import (
    layer_format,
    linear_layers,
    num_quantized,
    outer_formats,
    outer_matrices,
)
from gptvq_jax.run.forward import wants_float, wants_middle

LAST = len(STAGES)
OF_A_STEP = 5  # per window and row: a comparison; a difference, its weighted square, and a sum


def run_flop(
    config: ModelConfig,
    settings: RunSettings,
    evaluated: int | None = None,
    platform: str | None = None,
) -> dict[str, float]:
    """FLOP of a run's products by stage; stages that compute nothing are left out.

    Args:
      config: of the model.
      settings: of the run.
      evaluated: windows of the held-out text, where the settings take all of a text.
      platform: of `opens_again`.
    """
    found = {
        "forward": forward_flop(config, settings),
        "gradients": gradients_flop(config, settings),
        "allocation": allocation_flop(config, settings),
        **calibration_flop(config, settings, platform),
        "quantize": quantize_flop(config, settings),
        "tune": tune_flop(config, settings),
        "embed": outer_flop(config, settings),
        "tune model": model_tuning_flop(config, settings),
        "evaluate": evaluate_flop(config, settings, evaluated),
    }
    return {stage: flop for stage, flop in found.items() if flop}


def model_tuning_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of tuning the whole model, and of what the float model leaves for it."""
    if not settings.tune.model:
        return 0
    f, time = settings.finetune, settings.calibration.seqlen
    outputs = flops.blocks_forward(config, f.num_windows + f.held_out, time)
    micro_batches = f.steps * f.batch_size // f.micro_batch
    return outputs + micro_batches * flops.model_tuning(config, f.micro_batch, time)


def forward_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of the float model's states, of as many blocks as something reads them of."""
    c = settings.calibration
    wanted = num_quantized(settings, config) if wants_float(settings) else 0
    if settings.weight_groups:
        wanted = config.num_hidden_layers
    counts = config.block_counts(wanted).items() if wanted else ()
    return sum(n * flops.block_forward(block, c.all_windows, c.seqlen) for block, n in counts)


def gradients_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of token weights, and of the moments that error curves need."""
    if not settings.weight_groups:
        return 0
    c, shape = settings.calibration, (settings.calibration.all_windows, settings.calibration.seqlen)
    size = sum(
        flops.head_backward(config, part.stop - part.start, c.seqlen) for part in window_batches(c)
    )
    every = config.block_counts().items()
    size += sum(n * flops.block_backward(block, *shape) for block, n in every)
    if settings.allocation.bits_per_value:
        for block, n in _quantized_blocks(config, settings):
            sampled = num_windows(settings, block, (c.num_windows, c.seqlen))
            parts = (p for p in window_batches(c) if p.start < sampled)
            tokens = sum(part.stop - part.start for part in parts) * c.seqlen
            size += n * moments_flop(block, settings, tokens, range(LAST))
    return size


def allocation_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of the Hessians' factors, and of the error curves of all blocks."""
    if not settings.allocation.bits_per_value:
        return 0
    blocks = _quantized_blocks(config, settings)
    return curves_flop(config, settings) + sum(n * factors_flop(b, settings) for b, n in blocks)


def curves_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of the error curves of all blocks, but for their Hessians."""
    groups, size = settings.calibration.gradient_groups or 1, 0.0
    for layer, (rows, cols) in linear_layers(settings, config).items():
        for quick, part in measured_candidates(settings, layer, rows, cols):
            size += groups * (quick.flops(part, cols) + unit(part, cols))
    return size


def measured_candidates(
    settings: RunSettings, layer: tuple[int, str], rows: int, cols: int
) -> list[tuple[Any, int]]:
    """(settings, rows of each group) of what is quantized for a layer's error curve."""
    rule = layer_format(settings, *layer).rule
    of_layer = choices(settings, rule) if is_open(settings, rule) else []
    groups, found = settings.calibration.gradient_groups or 1, []
    for candidate in to_measure(of_layer, settings.allocation.measured):
        quick = dataclasses.replace(
            candidate, em_iterations=settings.allocation.em_iterations, polish_rounds=0
        )
        part = rows // groups
        if settings.allocation.sample:
            part = candidate.parts(part, cols)[0].rows
        found.append((quick, part))
    return found


def calibration_flop(
    config: ModelConfig, settings: RunSettings, platform: str | None = None
) -> dict[str, float]:
    """Of stages "hessians" and "advance"; `platform` is that of `opens_again`."""
    c = settings.calibration
    found = {"hessians": 0.0, "advance": 0.0}
    if c.statistics:
        return found
    shape, last = (c.all_windows, c.seqlen), num_quantized(settings, config)
    tokens, crosses = c.all_windows * c.seqlen, wants_middle(settings)
    by_stage = settings.true_sequential
    last_stage = LAST - 2 if opens_again(platform) else LAST - 1
    start = last_stage if by_stage and not settings.tune.block else 0
    for index in range(last):
        block = config.of_block(index)
        runs = [(max(0, s - 1), s, [s]) for s in range(LAST)]
        for first, stop, stages in runs if by_stage else [(0, LAST - 1, range(LAST))]:
            size = flops.stage_flops(block, range(first, stop), *shape)
            size += moments_flop(block, settings, tokens, stages, crosses)
            if crosses:
                size += flops.closing_outputs(block, _crossed(block, stages), *shape)
            found["hessians"] += size
        if index + 1 < last and c.inputs == "quantized":
            found["advance"] += flops.stage_flops(block, range(start, LAST), *shape)
    return found


def _crossed(config: ModelConfig, stages: Iterable[int]) -> set[int]:
    return {config.layers.stage_of[n] for n in config.linear_layers} & set(stages)


def moments_flop(
    config: ModelConfig,
    settings: RunSettings,
    tokens: int,
    stages: Iterable[int],
    crosses: bool = False,
) -> float:
    """Of adding tokens to the moments of some stages of a block, as calibrate.moment_flops."""
    size, stages = 0.0, set(stages)
    for name, rows, cols in owners(config, settings):
        if config.layers.stage_of[name] not in stages:
            continue
        seen = tokens
        if expert_of(name) is not None:
            seen = tokens * config.experts_per_token // config.experts
        size += second_moment(seen, cols, tile_size(cols))
        if crosses:
            closing = closes(config, config.layers.stage_of[name])
            size += cross_moment(seen, rows if closing else cols, cols)
    return size


def factors_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of the factors of a block's Hessians."""
    return sum(inverse_cholesky(cols) for _, _, cols in owners(config, settings))


def owners(config: ModelConfig, settings: RunSettings) -> list[tuple[str, int, int]]:
    """(layer, rows, inputs) of each moment of a block: of those that share one, the first."""
    groups, shapes = settings.calibration.gradient_groups, layer_shapes(config)
    found = []
    for together in config.linear_groups:
        for name in together if groups else together[:1]:
            rows, cols = shapes[name]
            found += [(name, rows // (groups or 1), cols)] * (groups or 1)
    return found


def quantize_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of factors, of quantizing all layers, and of measuring their errors."""
    c, groups = settings.calibration, settings.calibration.gradient_groups or 1
    blocks = _quantized_blocks(config, settings)
    size = sum(n * factors_flop(block, settings) for block, n in blocks)
    shifted = 3 * wants_middle(settings)  # the shift, and two to solve for the target
    measured = 2 * (1 + (c.held_out > 0))
    for layer, (rows, cols) in linear_layers(settings, config).items():
        used = used_settings(settings, layer_format(settings, *layer))
        per_layer = [groups * of.flops(rows // groups, cols) for of in used]
        size += sum(per_layer) / max(len(per_layer), 1)
        size += (measured + shifted * bool(used)) * unit(rows, cols)
    return size


def search_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of the searches of trellis codes in all layers."""
    size = 0.0
    for layer, (rows, cols) in linear_layers(settings, config).items():
        used = used_settings(settings, layer_format(settings, *layer))
        size += sum(OF_A_STEP * search_steps(of, rows, cols) for of in used) / max(len(used), 1)
    return size


def used_settings(settings: RunSettings, of: Format) -> list[Any]:
    """What a layer may be quantized with, nothing where it stays dense.

    A budget that fills columns is that of the mean layer.
    """
    budget = settings.allocation.bits_per_value
    if not budget or not is_open(settings, of.rule):
        return [of.settings] if of.coder else []
    return choices(settings, of.rule) or [
        dataclasses.replace(of.settings, bits=min(budget, MAX_RATE))
    ]


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


def tune_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of all epochs in all blocks, at most."""
    if not settings.tune.block:
        return 0
    c, t, size = settings.calibration, settings.tune, 0.0
    steps = c.num_windows // t.batch_size
    for block, n in _quantized_blocks(config, settings):
        errors = (t.epochs + 1) * flops.block_forward(block, c.held_out, c.seqlen)
        tuning = t.epochs * steps * flops.block_tuning(block, t.batch_size, c.seqlen)
        size += n * (errors + tuning)
    return size


def outer_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of embedding and head, where a rule codes them."""
    matrices = outer_matrices(config)
    return sum(
        method_flop(of.settings, *matrices[name])
        for name, of in outer_formats(settings, config).items()
        if of.method not in (DENSE, INT8)
    )


def evaluate_flop(
    config: ModelConfig, settings: RunSettings, evaluated: int | None = None
) -> float:
    """Of both models on the held-out text, and of the comparison of their heads."""
    e = settings.evaluation
    windows = evaluated or e.num_windows
    if not windows:
        return 0
    heads = 0
    for start in range(0, windows, e.batch_size):
        count = min(e.batch_size, windows - start)
        heads += 2 * flops.head_forward(config, count, e.seqlen, pair_chunk(config, count))
    return 2 * flops.blocks_forward(config, windows, e.seqlen) + heads


def evaluation_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of the perplexity of one model; 0 where the length of the text is not known."""
    shape = settings.evaluation.num_windows, settings.evaluation.seqlen
    chunk = head_chunk(config, settings.evaluation.batch_size)
    return flops.blocks_forward(config, *shape) + flops.head_forward(config, *shape, chunk)


def _quantized_blocks(config: ModelConfig, settings: RunSettings):
    return config.block_counts(num_quantized(settings, config)).items()
