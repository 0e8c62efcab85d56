"""Every method and setting on saved layers: error, bits, seconds cold and warm."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.console.errors import first_line
from gptvq_jax.console.stopwatch import peak_memory_bytes
from gptvq_jax.core import metrics
from gptvq_jax.core.hessian import factorize
from gptvq_jax.core.quantized_tensor import QuantizedTensor, dequantize_compiled
from gptvq_jax.methods.aqlm import AQLMSettings
from gptvq_jax.methods.gptvq_settings import GPTVQSettings
from gptvq_jax.methods.layer import Objective, quantize_layer
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.methods.trellis import TrellisSettings
from gptvq_jax.methods.uniform import UniformSettings
from gptvq_jax.study.sample_layers import random_layer

# Named by dimension and nominal bits; the groups are those of the published measurements on the
# official code: 4 x 64, 32 x 64, 64 x 192 and 192 x 192 weights.
# More work than the defaults: a layer's error feels it, the model hardly does (docs/quality.md).
_THOROUGH = dict(polish_rounds=6, update_iterations=6)
VQ_SETTINGS = {
    "1d_2.125": dict(dim=1, bits=2.0, group_size=256, max_group_cols=64, **_THOROUGH),
    "2d_2.125": dict(dim=2, bits=2.0, group_size=2048, max_group_cols=64, **_THOROUGH),
    "2d_3.083": dict(dim=2, bits=3.0, group_size=12288, max_group_cols=192, **_THOROUGH),
    "4d_2.222": dict(dim=4, bits=2.0, group_size=36864, max_group_cols=192, **_THOROUGH),
}
# With a scale for every row, in groups that cost so much less: at most the same true bits where a
# row has 576 weights or more.
VQ_ROW_SETTINGS = {
    "2d_2.125_rows": VQ_SETTINGS["2d_2.125"] | dict(group_size=2592, row_scales=True),
    "2d_3.083_rows": VQ_SETTINGS["2d_3.083"] | dict(group_size=18432, row_scales=True),
}
AQLM_SETTINGS = {
    "aqlm_1x8": dict(num_codebooks=1, code_bits=8, dim=4),
    "aqlm_1x12": dict(num_codebooks=1, code_bits=12, dim=8),
    "aqlm_2x8": dict(num_codebooks=2, code_bits=8, dim=8),
    "aqlm_4x8": dict(num_codebooks=4, code_bits=8, dim=16),
    "aqlm_8x8": dict(num_codebooks=8, code_bits=8, dim=16),
    # Measured only where it is asked for: with as many centroids as a small layer has vectors, it
    # takes long and says little.
    "aqlm_1x16": dict(
        num_codebooks=1, code_bits=16, dim=8, seed="random", em_iterations=2, rounds=2
    ),
}
ONLY_BY_NAME = ("aqlm_1x16", "trellis_2.084", "trellis_2.102", "trellis_2.225", "trellis_2.62")
UNIFORM_SETTINGS = {
    f"int{bits}_g128": dict(bits=bits, group_size=128, symmetric=True) for bits in (2, 3, 4)
}
# Named by true bits per value: those of the codebooks above with their scales. L = 12, or 10.
TRELLIS_SETTINGS = {
    "trellis_2.13": dict(bits=2.133),
    "trellis_3.08": dict(bits=3.085),
    "trellis_2.13_l10": dict(bits=2.133, window_bits=10),
    "trellis_3.08_l10": dict(bits=3.085, window_bits=10),
    # At most the bits of aqlm_2x8 on single layers, whose small ones pay more for codebooks.
    "trellis_2.084": dict(bits=2.0844),
    "trellis_2.102": dict(bits=2.1018),
    "trellis_2.225": dict(bits=2.2253),
    "trellis_2.62": dict(bits=2.6203),
}
DAMPING = 0.01
RATIO_FIELDS = ("relative_error", "seconds_cold", "seconds")


def settings_of(method: str) -> dict[str, Any]:
    """{name: settings} that a method is measured with."""
    if METHODS[method].settings is UniformSettings:
        return {name: UniformSettings(**s) for name, s in UNIFORM_SETTINGS.items()}
    if METHODS[method].settings is AQLMSettings:
        return {name: AQLMSettings(**s) for name, s in AQLM_SETTINGS.items()}
    if METHODS[method].settings is TrellisSettings:
        return {name: TrellisSettings(**s) for name, s in TRELLIS_SETTINGS.items()}
    return {name: GPTVQSettings(**s) for name, s in (VQ_SETTINGS | VQ_ROW_SETTINGS).items()}


def layer_files(directory: Path) -> list[Path]:
    """The .npz files of a directory.

    Raises:
      FileNotFoundError: there are none.
    """
    files = sorted(directory.glob("*.npz"))
    if not files:
        raise FileNotFoundError(
            f"no .npz files in {directory}; remove it or pass another one with --layers=DIR"
        )
    return files


def load_layer(path: Path) -> tuple[jax.Array, jax.Array]:
    """weight (R, C) and hessian (C, C) of a .npz; the scale of the Hessian does not matter."""
    with np.load(path) as arrays:
        if not {"weight", "hessian"} <= set(arrays):
            raise ValueError(f"{path} must hold 'weight' and 'hessian', it has {list(arrays)}")
        return jnp.asarray(arrays["weight"]), jnp.asarray(arrays["hessian"])


def load_held_out(path: Path) -> jax.Array | None:
    """Hessian (C, C) of a .npz on text that nothing is fitted to; None where it has none."""
    with np.load(path) as arrays:
        return jnp.asarray(arrays["held_out"]) if "held_out" in arrays else None


def quantize_once(
    weight: jax.Array, hessian: jax.Array, method: str, setting: str, name: str
) -> tuple[QuantizedTensor, float]:
    """The quantized layer, and seconds from its Hessian to the end.

    Args:
      weight: (R, C).
      hessian: (C, C).
      method: name in METHODS.
      setting: name in settings_of(method).
      name: the layer, for messages.
    """
    return quantize_with(weight, hessian, method, settings_of(method)[setting], name)


def quantize_with(
    weight: jax.Array,
    hessian: jax.Array,
    method: str,
    settings: Any,
    name: str,
    damping: float = DAMPING,
    seed: int = 0,
) -> tuple[QuantizedTensor, float]:
    """`quantize_once` with any settings of the method."""
    start = time.perf_counter()
    objective = Objective(hessian, factorize(hessian, damping, name))
    quantize, key = METHODS[method].quantize, jax.random.key(seed)
    tensor = quantize_layer(quantize, settings, weight, [objective], key, name=name)
    jax.block_until_ready(tensor)
    return tensor, time.perf_counter() - start


def measure(path: Path, method: str, setting: str) -> dict[str, Any]:
    """One row: the layer is quantized twice, with and without compilation."""
    layer = load_layer(path)
    _, cold = quantize_once(*layer, method, setting, path.stem)
    tensor, warm = quantize_once(*layer, method, setting, path.stem)
    error = _relative_error(tensor, *layer)
    return {
        "layer": path.stem,
        "method": method,
        "setting": setting,
        "relative_error": error,
        "sqnr_db": float(metrics.sqnr_db(error)),
        "bits_per_value": tensor.bits_per_value,
        "seconds_cold": cold,
        "seconds": warm,
    }


def measure_memory(rows: int, cols: int, method: str, setting: str) -> dict[str, Any]:
    """One row for a random layer, with the largest resident memory of this process.

    Only the first call in a process measures it: the system keeps one peak for the whole of a
    process. What came before the quantization (Python, JAX, the making of the layer) is in it and
    is also given alone.

    Args:
      rows, cols: shape of the weight.
      method: name in METHODS.
      setting: name in settings_of(method).
    """
    layer = jax.block_until_ready(random_layer(rows, cols))
    before = peak_memory_bytes()
    tensor, cold = quantize_once(*layer, method, setting, "random layer")
    peak = peak_memory_bytes()
    return {
        "method": method,
        "setting": setting,
        "memory_before_bytes": before,
        "peak_memory_bytes": peak,
        "seconds_cold": cold,
        "relative_error": _relative_error(tensor, *layer),
        "bits_per_value": tensor.bits_per_value,
    }


def _relative_error(tensor: QuantizedTensor, weight: jax.Array, hessian: jax.Array) -> float:
    return float(metrics.relative_error(weight, dequantize_compiled(tensor), hessian))


def choose(methods: Sequence[str], settings: Sequence[str] | None) -> list[tuple[str, str]]:
    """(method, setting) pairs to measure.

    Args:
      methods: names in METHODS.
      settings: names to keep; None: all that a method has.

    Raises:
      ValueError: an unknown method or setting.
    """
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    known = [(method, setting) for method in methods for setting in settings_of(method)]
    names = {setting for _, setting in known}
    for name in settings or ():
        if name not in names:
            raise ValueError(f"unknown setting {name!r}; choose from {', '.join(sorted(names))}")
    if settings is None:
        return [pair for pair in known if pair[1] not in ONLY_BY_NAME]
    return [pair for pair in known if pair[1] in settings]


def measure_all(directory: Path, chosen: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Rows for every layer file of a directory.

    Args:
      directory: holds .npz files with 'weight' and 'hessian'.
      chosen: (method, setting) pairs, from `choose`.

    Raises:
      FileNotFoundError: no layers.
      ValueError: a file of something else.
    """
    for path in layer_files(directory):
        for method, setting in chosen:
            yield measure(path, method, setting)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows that scripts/benchmark_layers.py wrote with --json.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; make it with --json")
    try:
        rows = json.loads(path.read_text())
        if not isinstance(rows, list) or not rows:
            raise ValueError("no list of rows")
        for row in rows:
            _ = row["layer"], row["method"], row["setting"], *(row[f] + 0.0 for f in RATIO_FIELDS)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} does not hold rows of this benchmark ({first_line(error)}); "
            "pass a file made with --json"
        ) from None
    return rows


def compare(row: dict[str, Any], baseline: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Ratios row / earlier row in RATIO_FIELDS, None where there is no earlier row.

    The earlier row is of the same layer and setting, by any method; where several methods were
    measured, by the same one.

    Raises:
      ValueError: several such rows.
    """
    found = [r for r in baseline if all(r[k] == row[k] for k in ("layer", "setting"))]
    same = [r for r in found if r["method"] == row["method"]]
    found = same or found
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} earlier rows compare with {row['layer']} {row['method']} "
            f"{row['setting']}; keep one of them in the file"
        )
    return {field: _ratio(row[field], found[0][field]) for field in RATIO_FIELDS}


def summarize(
    rows: Sequence[dict[str, Any]], ratios: Sequence[dict[str, float] | None]
) -> list[dict[str, Any]]:
    """One row per (method, setting): mean error, total seconds, mean and largest ratios.

    Args:
      rows: of several layers.
      ratios: of each row, from `compare`.

    Returns:
      Rows with the geometric mean of 'relative_error' over 'layers' layers, total 'seconds_cold'
      and 'seconds', and over 'compared' layers 'ratios': {field: (geometric mean, largest)}.
    """
    groups = defaultdict(list)
    for row, ratio in zip(rows, ratios, strict=True):
        groups[row["method"], row["setting"]].append((row, ratio))
    summary = []
    for (method, setting), pairs in groups.items():
        compared = [ratio for _, ratio in pairs if ratio is not None]
        columns = {f: [r[f] for r in compared] for f in RATIO_FIELDS if compared}
        summary.append({
            "method": method,
            "setting": setting,
            "layers": len(pairs),
            "relative_error": geometric_mean([row["relative_error"] for row, _ in pairs]),
            "seconds_cold": sum(row["seconds_cold"] for row, _ in pairs),
            "seconds": sum(row["seconds"] for row, _ in pairs),
            "compared": len(compared),
            "ratios": {f: (geometric_mean(c), max(c)) for f, c in columns.items()},
        })  # fmt: skip
    return summary


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm; 0 if a value is."""
    with np.errstate(divide="ignore"):  # an exact layer makes it 0
        return float(np.exp(np.mean(np.log(values))))


def _ratio(new: float, old: float) -> float:
    if old == 0:
        return 1.0 if new == 0 else math.inf
    return new / old
