"""What a run will hold on the disk, from shapes: bytes by phase and item, at most.

The passes compare their own part with what is free as they begin (passes.py); this is all of it,
said before the first one.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from gptvq_jax.config import RunSettings
from gptvq_jax.core.divergence import FIGURES
from gptvq_jax.files.disk_space import FullDiskError, check_room, directory_bytes, size_text
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.rule_settings import is_open
from gptvq_jax.run import allocation, gradients
from gptvq_jax.run.activations import file_bytes
from gptvq_jax.run.evaluate import DTYPES
from gptvq_jax.run.formats import layer_format, linear_layers, num_quantized
from gptvq_jax.run.forward import wants_float, wants_middle
from gptvq_jax.run.passes import peak_bytes
from gptvq_jax.run.sizes import dense_item, format_bytes, stored_bytes
from gptvq_jax.run.work import used_settings
from gptvq_jax.run.workdir import WorkDir


class Item(NamedTuple):
    """What is on the disk in a phase."""

    phase: str
    name: str
    num_bytes: int


def disk_items(
    config: ModelConfig, settings: RunSettings, evaluated: int | None = None
) -> list[Item]:
    """All of a run, by phase.

    Args:
      config: of the model.
      settings: of the run.
      evaluated: windows of the held-out text, where the settings take all of a text.
    """
    c, e = settings.calibration, settings.evaluation
    shape, depth = (c.all_windows, c.seqlen), config.num_hidden_layers
    windows = evaluated or e.num_windows
    held_out = file_bytes((windows, e.seqlen, config.hidden_size), DTYPES[e.products])
    stored = most_stored_bytes(config, settings)
    found, kept = [], 0
    if settings.weight_groups:
        allocates = settings.allocation.bits_per_value > 0
        stream = file_bytes((*shape, config.hidden_size))
        points = depth + 1 + depth * wants_middle(settings)
        curves = allocation.curve_bytes(
            config, settings, num_quantized(settings, config) if allocates else 0
        )
        beside = gradients.peak_bytes(config, shape, settings.weight_groups)
        kept = beside - 3 * stream
        found += [
            Item("gradients", "activations of the float model", points * stream),
            Item("gradients", "gradients", 3 * stream),
            Item("gradients", "token weights", kept),
            Item("gradients", "error curves", curves),
            Item("gradients", "float model on the held-out text", 3 * held_out),
        ]
        kept += curves
    streams = peak_bytes(config, settings, shape, 0)
    if c.statistics:
        streams = 0
    first = 3 if not (settings.weight_groups and wants_float(settings)) else 1
    found += [
        Item("quantize", "activations", streams),
        Item("quantize", "token weights and error curves", kept),
        Item("quantize", "checkpoint", stored),
        Item("quantize", "float model on the held-out text", first * held_out),
        Item("evaluate", "token weights and error curves", kept),
        Item("evaluate", "checkpoint", stored),
        Item("evaluate", "both models on the held-out text", 4 * held_out),
        Item("evaluate", "figures of its tokens", 4 * windows * e.seqlen * len(FIGURES)),
    ]
    if settings.tune.model:
        f = settings.finetune
        outputs = file_bytes((f.num_windows + f.held_out, c.seqlen, config.hidden_size))
        found += [
            Item("tune model", "checkpoint, before and after", 2 * stored),
            Item("tune model", "outputs of the float model", 3 * outputs),
            Item("tune model", "both models on the held-out text", 4 * held_out),
        ]
    return [item for item in found if item.num_bytes]


def disk_peak(items: Iterable[Item]) -> tuple[int, str]:
    """Most bytes of a phase, and which."""
    sums: dict[str, int] = {}
    for item in items:
        sums[item.phase] = sums.get(item.phase, 0) + item.num_bytes
    return max((size, phase) for phase, size in sums.items())


def most_stored_bytes(config: ModelConfig, settings: RunSettings) -> int:
    """Of the packed checkpoint, at most; a budget of bits is never exceeded."""
    budget, plan, most, values = settings.allocation.bits_per_value, {}, 0, 0
    if not budget:
        return stored_bytes(config, settings, plan)
    item, groups = dense_item(settings), settings.calibration.gradient_groups or 1
    for layer, shape in linear_layers(settings, config).items():
        of = layer_format(settings, *layer)
        if is_open(settings, of.rule):
            plan[layer] = max(used_settings(settings, of), key=lambda candidate: candidate.bits)
            with_largest = layer_format(settings, *layer, plan)
            most += format_bytes(with_largest, *shape, item, groups)
            values += math.prod(shape)
    saved = max(0, most - math.ceil(budget * values / 8))
    return stored_bytes(config, settings, plan) - saved


def check_disk(config: ModelConfig, settings: RunSettings, workdir: WorkDir, windows: int) -> None:
    """Checks, before any work, that the disk has room for the whole run.

    Args:
      config, settings: of the run.
      workdir: of the run; what is there already counts as room.
      windows: of the held-out text.

    Raises:
      FullDiskError: it has not; names the largest items, and the settings that lower them.
    """
    items = disk_items(config, settings, windows)
    size, phase = disk_peak(items)
    try:
        check_room(workdir.path, size - directory_bytes(workdir.path))
    except FullDiskError as error:
        of_phase = sorted(
            (item for item in items if item.phase == phase), key=lambda item: -item.num_bytes
        )
        parts = ", ".join(f"{item.name} {size_text(item.num_bytes)}" for item in of_phase[:3])
        fields = "calibration.num_windows"
        if settings.weight_groups:
            fields += " or calibration.gradient_groups and allocation.bits_per_value"
        raise FullDiskError(
            error.errno,
            f"{error.strerror} (at most, while it is at '{phase}': {parts}); or lower {fields}",
        ) from None
