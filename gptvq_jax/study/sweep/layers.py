"""A cell that is a setting on some layers of a float model, each by itself.

They are those of scripts/benchmark_layers.py. Layers are quantized under Hessians of the
calibration text, towards their own outputs, and the error that counts is that under Hessians of the
held-out text, which nothing was fitted to.
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from gptvq_jax.config import RunSettings
from gptvq_jax.console.progress import Progress
from gptvq_jax.core import metrics
from gptvq_jax.core.quantized_tensor import dequantize_compiled
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.flops import block_inputs
from gptvq_jax.models.source import layer_shapes
from gptvq_jax.run import job
from gptvq_jax.run.work import method_flop
from gptvq_jax.study.layer_benchmark import (
    geometric_mean,
    layer_files,
    load_held_out,
    load_layer,
    quantize_with,
)
from gptvq_jax.study.sample_layers import SAMPLED_LAYERS, make_layers
from gptvq_jax.study.sweep.cells import Cell, Sweep, refuse
from gptvq_jax.study.sweep.directory import Directory
from gptvq_jax.study.sweep.sources import Sources

_EVALUATION = ("dataset", "num_windows", "seqlen")
_CALIBRATION = ("datasets", "dataset_weights", "num_windows", "seqlen", "seed")


class Sample(NamedTuple):
    """Layers of a model with their Hessians, which cells share."""

    name: str
    kind: str = "layers"


class Layers:
    """How the cells of a sweep of kind "layers" are made; see drive.Maker.

    Args:
      sweep: resolved.
      path: of the sweep's directory.
    """

    def __init__(self, sweep: Sweep, path: str | Path):
        self._directory, self._sources = Directory(path), Sources()
        self.sweep = refuse(sweep, self._sources.check)

    def passes(self, cell: Cell) -> list[Sample]:
        """The layers that a cell is measured on."""
        c, e = cell.settings.calibration, cell.settings.evaluation
        key = {
            "model": self._sources.of(cell).fingerprint,
            "calibration": {name: getattr(c, name) for name in _CALIBRATION},
            "evaluation": {name: getattr(e, name) for name in _EVALUATION},
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return [Sample(f"layers-{digest[:12]}")]

    def is_made(self, of: Sample) -> bool:
        return self._directory.shared(of.name).exists()

    def make(self, of: Sample, cell: Cell) -> None:
        """Makes the layers that a cell is measured on."""
        source = self._sources.of(cell)
        # What is held out here is the text of the evaluation.
        c = dataclasses.replace(cell.settings.calibration, held_out=0)
        settings = dataclasses.replace(cell.settings, calibration=c)
        texts = job.calibration_tokens(source, settings), job.evaluation_tokens(source, settings)
        wanted = wanted_layers(source.config)
        with Progress(max(wanted) + 1, "sample layers", "block") as progress:
            path = self._directory.shared(of.name)
            make_layers(source, texts[0], wanted, path, progress, held_out=texts[1])

    def forget(self, of: Sample) -> None:
        """They are small, and stay."""

    def run(self, cell: Cell) -> dict[str, Any]:
        """Measures a setting on every layer."""
        (sample,) = self.passes(cell)
        files, rows = layer_files(self._directory.shared(sample.name)), []
        with Progress(len(files), cell.name, "layer") as progress:
            for path in files:
                rows.append(measure(path, cell.settings))
                progress.advance(path.stem)
        error = geometric_mean([row["relative_error"] for row in rows])
        values = [row.pop("num_values") for row in rows]
        bits = [row["bits_per_value"] * count for row, count in zip(rows, values, strict=True)]
        return {
            "bits_per_value": math.fsum(bits) / sum(values),
            "sqnr_db": float(metrics.sqnr_db(error)),
            "relative_error": error,
            "seconds": math.fsum(row["seconds"] for row in rows),
            "layers": rows,
        }

    def cell_flop(self, cell: Cell) -> float:
        of_method = cell.settings.method_settings
        return float(sum(method_flop(of_method, *shape) for shape in self._shapes(cell)))

    def pass_flop(self, of: Sample, cell: Cell) -> float:
        c, e = cell.settings.calibration, cell.settings.evaluation
        config = self._sources.of(cell).config
        shapes = (c.num_windows, c.seqlen), (e.num_windows, e.seqlen)
        blocks = max(wanted_layers(config)) + 1
        return float(blocks * sum(block_inputs(config, *shape) for shape in shapes))

    def cell_bytes(self, cell: Cell) -> tuple[int, int]:
        return 0, 0

    def pass_bytes(self, of: Sample, cell: Cell) -> int:
        return sum(4 * cols * (rows + 2 * cols) for rows, cols in self._shapes(cell))

    def _shapes(self, cell: Cell) -> list[tuple[int, int]]:
        config = self._sources.of(cell).config
        found = []
        for index, names in wanted_layers(config).items():
            shapes = layer_shapes(config.of_block(index))
            for name in names:
                if name not in shapes:
                    raise ValueError(
                        f"block {index} of {cell.settings.model} has no {name}: a sweep of kind "
                        "'layers' cannot measure it; use kind 'models'"
                    )
                found.append(shapes[name])
        return found


def wanted_layers(config: ModelConfig) -> dict[int, tuple[str, ...]]:
    """`SAMPLED_LAYERS`, at the same relative depth in models of other depths."""
    depth, last = config.num_hidden_layers, max(SAMPLED_LAYERS)
    wanted: dict[int, tuple[str, ...]] = {}
    for block, names in SAMPLED_LAYERS.items():
        index = round(block * (depth - 1) / last)
        wanted[index] = wanted.get(index, ()) + names
    return wanted


def measure(path: Path, settings: RunSettings) -> dict[str, Any]:
    """One layer under the settings of a run; its seconds have the compilation of a first shape.

    Args:
      path: of a .npz with `weight`, `hessian` and `held_out`.
      settings: method, its settings, damping and seed.
    """
    weight, hessian = load_layer(path)
    held_out = load_held_out(path)
    method, of_method = settings.method, settings.method_settings
    parts = method, of_method, path.stem, settings.damping, settings.seed
    tensor, seconds = quantize_with(weight, hessian, *parts)
    quantized = dequantize_compiled(tensor)
    error, fitted = (
        float(metrics.relative_error(weight, quantized, h)) for h in (held_out, hessian)
    )
    return {
        "layer": path.stem,
        "relative_error": error,
        "sqnr_db": float(metrics.sqnr_db(error)),
        "fitted_error": fitted,
        "bits_per_value": tensor.bits_per_value,
        "seconds": seconds,
        "num_values": weight.size,
    }
