"""Seconds of each stage of a run, from its work and from what a machine does in a second."""

import dataclasses
import math
from collections.abc import Iterable
from statistics import median_low
from typing import Any, NamedTuple

from gptvq_jax.config import RunSettings
from gptvq_jax.core.flops import unit
from gptvq_jax.methods.gptvq_settings import GPTVQSettings
from gptvq_jax.methods.pool import num_workers
from gptvq_jax.models import flops
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.shapes import block_shapes, outer_shapes
from gptvq_jax.run import work
from gptvq_jax.run.disk import most_stored_bytes
from gptvq_jax.run.formats import layer_format, linear_layers, num_quantized
from gptvq_jax.run.forward import wants_middle
from gptvq_jax.study.plan.devices import Device
from gptvq_jax.study.plan.narrow import narrow_flop, product_seconds, without_budget
from gptvq_jax.study.plan.rates import Rates
from gptvq_jax.study.plan.traffic import Traffic, launches, stage_bytes
from gptvq_jax.study.random_model import model_bytes

# Assumed of this machine too, from runs on 2 cores of an AMD EPYC (Zen 5, AVX-512).
START = 2.5  # seconds of opening the model and drawing the report
TOKENIZED = 1e6  # bytes of text a second
DECODED = 0.4e9  # bytes/s of float32 weights as they are read and cast
STORED = 0.12e9  # bytes/s of a checkpoint, with its checksums, ...
STORED_BLOCK = 0.03  # ... and seconds of each of its trees
KEPT_PROGRAM = 0.8  # seconds to read a layer's compiled program, which more than one core does ...
KEPT_OTHERS = 2.0  # ... and all others
LAYER = 0.07  # seconds of a layer beside the program that quantizes it: targets, errors, codes' use
# Assumed of a machine that is not here: bytes/s of its disk, and of files that its memory keeps;
# the part of its memory that may be full of them.
FILES, KEPT_FILES, KEPT_PART = 2e9, 6e9, 0.8
# Bytes of text that are tokenized: those of the packages and data sets themselves.
TEXT_BYTES = {"wikipedia": 6.8e6, "wikitext2": 12.2e6, "ptb": 5.5e6, "c4": 20e6, "news": 1e6}
ELSEWHERE = "gpu"  # the platform of a machine that is not here: no CPU
_OF_SEARCH = 3  # operations of each centroid and weight: a difference, its square, a comparison


class Stage(NamedTuple):
    """A line of the plan."""

    name: str
    flop: float
    num_bytes: float
    launches: float | None
    seconds: float
    of_files: float = 0.0  # of these, on a device that is not here


class Use(NamedTuple):
    """Layers that are quantized alike, of all blocks together."""

    method: str
    settings: Any
    rows: int  # of each group of rows
    cols: int
    count: float  # how many: a layer that may have one of several settings has a part of each


def uses(config: ModelConfig, settings: RunSettings) -> list[Use]:
    """What the layers of a run are quantized with."""
    groups, found = settings.calibration.gradient_groups or 1, {}
    for layer, (rows, cols) in linear_layers(settings, config).items():
        of = layer_format(settings, *layer)
        used = work.used_settings(settings, of)
        for chosen in used:
            key = of.coder, chosen, rows // groups, cols
            found[key] = found.get(key, 0.0) + groups / len(used)
    return [Use(*key, count) for key, count in found.items()]


def quick_uses(config: ModelConfig, settings: RunSettings) -> list[Use]:
    """What is quantized for error curves."""
    groups, found = settings.calibration.gradient_groups or 1, {}
    if not settings.allocation.bits_per_value:
        return []
    for layer, (rows, cols) in linear_layers(settings, config).items():
        for chosen, part in work.measured_candidates(settings, layer, rows, cols):
            key = settings.method, chosen, part, cols
            found[key] = found.get(key, 0.0) + groups
    return [Use(*key, count) for key, count in found.items()]


def to_probe(found: Iterable[Use]) -> list[tuple[str, Any, tuple[int, int]]]:
    """(method, settings, shape) of what is measured, from which the others follow.

    Of GPTVQ those with the fewest and the most centroids of each dimension and count of rounds; of
    another method the first.
    """
    groups: dict[Any, list[Use]] = {}
    for use in found:
        groups.setdefault(_alike(use.settings), []).append(use)
    chosen = []
    for alike in groups.values():
        alike = sorted(alike, key=lambda use: (_size(use.settings), -use.rows * use.cols))
        ends = [alike[0]]
        if _size(alike[-1].settings) > _size(alike[0].settings):
            ends.append(alike[-1])
        chosen += [(use.method, use.settings, (use.rows, use.cols)) for use in ends]
    return chosen


def _alike(settings: Any) -> Any:
    if isinstance(settings, GPTVQSettings):
        return GPTVQSettings, settings.dim, settings.em_iterations, settings.polish_rounds
    return type(settings)


def _size(settings: Any) -> int:
    return settings.codebook_size if isinstance(settings, GPTVQSettings) else 0


def per_weight(rates: Rates, settings: Any) -> float:
    """Seconds for each weight beside the products: measured, or on a line over the centroids."""
    if settings in rates.per_weight:
        return rates.per_weight[settings]
    alike = [(_size(s), t) for s, t in rates.per_weight.items() if _alike(s) == _alike(settings)]
    if len(alike) < 2:
        return alike[0][1]
    (low, first), (high, second) = min(alike), max(alike)
    return first + (second - first) * (_size(settings) - low) / (high - low)


def _layers_seconds(rates: Rates, found: Iterable[Use]) -> float:
    return sum(
        use.count
        * (
            per_weight(rates, use.settings) * use.rows * use.cols
            + use.settings.flops(use.rows, use.cols) / rates.products
        )
        for use in found
    )


def _parts(config: ModelConfig, settings: RunSettings, evaluated: int) -> dict[str, float]:
    """FLOP that go at rates of their own."""
    e, c = settings.evaluation, settings.calibration
    blocks = config.block_counts(num_quantized(settings, config)).items()
    every = config.block_counts().items()
    shape = c.all_windows, c.seqlen
    layers = linear_layers(settings, config).values()
    measured = 2 * (1 + (c.held_out > 0)) + 3 * wants_middle(settings)
    return {
        "factors": sum(n * work.factors_flop(block, settings) for block, n in blocks),
        "measured": measured * sum(unit(*layer) for layer in layers),
        "backward": sum(n * flops.block_backward(block, *shape) for block, n in every),
        "evaluated": 2 * flops.blocks_forward(config, evaluated, e.seqlen),
    }


def here(config: ModelConfig, settings: RunSettings, evaluated: int, rates: Rates) -> list[Stage]:
    """The stages on this machine, programs compiled already."""
    flop = work.run_flop(config, settings, evaluated)
    size = stage_bytes(config, settings, evaluated)
    part = _parts(config, settings, evaluated)
    by, seconds = rates.by_stage, {}
    for stage in ("forward", "hessians", "advance", "tune"):
        if stage in flop:
            seconds[stage] = flop[stage] / by[stage]
    if "gradients" in flop:
        sums = work.gradients_flop(config, without_budget(settings))
        head = sums - part["backward"]
        seconds["gradients"] = part["backward"] / by["gradients"] + head / by["head backward"]
        seconds["gradients"] += (flop["gradients"] - sums) / by["hessians"]
    if "allocation" in flop:
        seconds["allocation"] = part["factors"] / rates.factor
        seconds["allocation"] += _layers_seconds(rates, quick_uses(config, settings))
    seconds["quantize"] = part["factors"] / rates.factor + part["measured"] / rates.products
    seconds["quantize"] += _layers_seconds(rates, uses(config, settings))
    seconds["quantize"] += LAYER * len(linear_layers(settings, config))
    outer = 4 * sum(map(math.prod, outer_shapes(config).values())) / DECODED  # a reading of it
    seconds["embed"] = flop.get("embed", 0) / rates.products + 2 * outer
    if "forward" in seconds:
        seconds["forward"] += outer
    if "evaluate" in flop:
        heads = flop["evaluate"] - part["evaluated"]
        seconds["evaluate"] = part["evaluated"] / by["evaluate"] + heads / by["head"]
    stages = [Stage("read text", 0, 0, None, text_seconds(settings))]
    idle = _dense_bytes(config, settings) / DECODED  # blocks that nothing else is done to meanwhile
    stages.append(Stage("load block", 0, 0, None, idle))
    for stage, own in seconds.items():
        moved = size[stage].moved if stage in size else 0
        stages.append(Stage(stage, flop.get(stage, 0), moved, None, own + moved / rates.files))
    stored = most_stored_bytes(config, settings)
    saving = stored / STORED + STORED_BLOCK * (config.num_hidden_layers + 2)
    stages.append(Stage("save", 0, stored, None, saving))
    stages.append(Stage("start and report", 0, 0, None, START + 3 * outer))
    return stages


def _dense_bytes(config: ModelConfig, settings: RunSettings) -> int:
    """Of the float32 weights of the blocks that stay dense, and of the first."""
    last, depth = num_quantized(settings, config), config.num_hidden_layers
    alone = [0, *range(last, depth)]
    shapes = (block_shapes(config.of_block(index)).values() for index in alone)
    return 4 * sum(math.prod(shape) for of_block in shapes for shape in of_block)


def text_seconds(settings: RunSettings) -> float:
    """Of reading and tokenizing the texts; a text of both sections is read once."""
    names = {settings.evaluation.dataset}
    if not settings.calibration.statistics:
        names |= set(settings.calibration.datasets)
    return sum(TEXT_BYTES.get(name, 5e6) for name in names) / TOKENIZED


def compile_seconds(
    config: ModelConfig, settings: RunSettings, rates: Rates
) -> tuple[float, float]:
    """Of the programs of a run: compiled, and read where an earlier run has kept them."""
    every = [*uses(config, settings), *quick_uses(config, settings)]
    programs = {(use.method, _program(use)) for use in every}
    at_once = max(1, min(num_workers(), len(programs)))
    # As much again for the programs that make a layer's target and measure it.
    of_layers = 2 * sum(rates.compile[f"a layer, {method}"] for method, _ in programs)
    kinds = len(config.block_counts())
    block, sums = rates.compile["block"], rates.compile["sums"]
    others = kinds * (2 * block + 2 * sums) + 2 * rates.compile["head"]
    others += kinds * rates.compile.get("gradients", 0.0)
    kept = KEPT_OTHERS + KEPT_PROGRAM * len(programs)
    return of_layers / at_once + others, kept


def compile_bytes(config: ModelConfig, settings: RunSettings, rates: Rates) -> int:
    """Of memory that the compiler leaves behind, beyond the programs that were measured.

    The first of these also made room for the compiler itself, so their median counts.
    """
    every = [*uses(config, settings), *quick_uses(config, settings)]
    count, known = len({(use.method, _program(use)) for use in every}), rates.program_bytes
    return max(0, count - len(known)) * median_low(known or [0])


def _program(use: Use) -> Any:
    """What programs of layers differ in."""
    rows = use.rows
    split = getattr(use.settings, "parts", None)
    if split is not None:
        rows = split(use.rows, use.cols)[0].rows
    kind = use.settings
    if isinstance(kind, GPTVQSettings):
        kind = dataclasses.replace(kind, em_iterations=0, polish_rounds=0)
    return kind if split else type(kind), rows, use.cols


def elsewhere(
    config: ModelConfig, settings: RunSettings, evaluated: int, device: Device, kept: bool
) -> list[Stage]:
    """The stages on a device as published, programs compiled already.

    Args:
      config: of the model.
      settings: of the run.
      evaluated: windows of the held-out text.
      device: with its host.
      kept: whether the host's memory keeps the files of activations: reading one then is a copy.
    """
    flop = work.run_flop(config, settings, evaluated, ELSEWHERE)
    flop["quantize"] = flop.get("quantize", 0.0) + work.search_flop(config, settings)
    flop["quantize"] += sum(use.count * _search(use) for use in uses(config, settings))
    size = stage_bytes(config, settings, evaluated, ELSEWHERE)
    count, narrow = launches(config, settings), narrow_flop(config, settings, flop)
    walks = 3 if settings.weight_groups else 1
    loaded = walks * model_bytes(config)
    stages = [
        Stage("read text", 0, 0, None, text_seconds(settings)),
        _reading("read weights", loaded, min(FILES, device.host_link)),
    ]
    for stage, own in flop.items():
        launched = count if stage == "quantize" else None
        seconds = product_seconds(own, narrow.get(stage, {}), device)
        moved = size.get(stage, Traffic(0, 0))
        of_files = moved_seconds(moved, device, kept)
        seconds += of_files + (launched or 0) * device.launch
        stages.append(Stage(stage, own, moved.moved, launched, seconds, of_files))
    stored = most_stored_bytes(config, settings)
    stages.append(_reading("save", stored, FILES))
    return [*stages, Stage("start and report", 0, 0, None, START)]


def _reading(name: str, size: float, rate: float) -> Stage:
    return Stage(name, 0, size, None, size / rate, size / rate)


def causes(stages: Iterable[Stage], device: Device) -> dict[str, float]:
    """Seconds on a device by what they go to."""
    stages = list(stages)
    files = sum(stage.of_files for stage in stages)
    launched = sum(stage.launches or 0 for stage in stages) * device.launch
    products = sum(
        stage.seconds - stage.of_files - (stage.launches or 0) * device.launch
        for stage in stages
        if stage.flop
    )
    return {"products": products, "files": files, "launches": launched}


def moved_seconds(moved: Traffic, device: Device, kept: bool) -> float:
    """Of files between the disk, the host's memory and the device, one after the other."""
    copied = moved.moved - moved.awaited
    on_host = copied / (KEPT_FILES if kept else FILES) + moved.awaited / FILES
    return on_host + moved.moved / device.host_link


def _search(use: Use) -> float:
    """Operations of the searches for nearest centroids, in EM, the sweep and recodes."""
    if not isinstance(use.settings, GPTVQSettings):
        return 0.0
    passes = 2 + use.settings.em_iterations + use.settings.polish_rounds
    return _OF_SEARCH * use.rows * use.cols * use.settings.codebook_size * passes
