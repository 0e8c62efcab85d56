"""What each choice is worth: one field of the config at a time, on layers and on the whole model.

Layer rows give the relative output error, geometric mean over the layers, on the Hessian that they
are fitted to and on that of other text. Model rows give the rise of log-perplexity over the float
model; they are for the choices that change the objective itself, whose relative errors do not
compare. The errors of their layers stand beside it, fitted and held out: how far these are apart
says whether there is text enough for what is fitted.
"""

import contextlib
import dataclasses
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptvq_jax.console.json_file import read_json_lines
from gptvq_jax.console.report import log_ratio
from gptvq_jax.console.stopwatch import stages_of
from gptvq_jax.core import metrics
from gptvq_jax.core.hessian import factorize
from gptvq_jax.core.quantized_tensor import dequantize_compiled
from gptvq_jax.files.durable import replacing, write_text
from gptvq_jax.methods.layer import Objective, quantize_layer
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.run import job
from gptvq_jax.study.ablation_rows import LAYER_ROWS, MODEL_ROWS, ROTATION
from gptvq_jax.study.layer_benchmark import (
    DAMPING,
    geometric_mean,
    load_held_out,
    load_layer,
    settings_of,
)
from gptvq_jax.study.rotation import random_rotation, rotate, rotate_back


def choose(
    tables: Sequence[str],
    rows: Sequence[str] | None,
    settings: Sequence[str],
    method: str,
) -> dict[str, list[str]]:
    """{setting, or 'model': names of its rows to make}, without those of which none is left.

    Args:
      tables: 'layers', 'model' or both.
      rows: names to keep; None: all.
      settings: of the layer table, names in layer_benchmark of a method in LAYER_ROWS.
      method: of the config of the model table.

    Raises:
      ValueError: no rows are known of a setting or method, or a name is in none of the tables; or
        one setting has rows of these names and another has none.
    """
    known: dict[str, dict[str, Any]] = {}
    if "layers" in tables:
        known |= {setting: LAYER_ROWS[method_of(setting)] for setting in settings}
    if "model" in tables:
        if method not in MODEL_ROWS:
            raise ValueError(
                f"method={method!r} of --config has no model rows; choose one of "
                f"{', '.join(MODEL_ROWS)}, or leave them out with --tables=layers"
            )
        known["model"] = MODEL_ROWS[method]
    names = {name for table in known.values() for name in table}
    for name in rows or ():
        if name not in names:
            raise ValueError(f"unknown row {name!r}; choose from {'; '.join(sorted(names))}")
    chosen = {t: [n for n in of if rows is None or n in rows] for t, of in known.items()}
    empty = [t for t, of in chosen.items() if not of and t != "model"]
    if empty and any(of for t, of in chosen.items() if t != "model"):
        raise ValueError(
            f"--settings={empty[0]} has no effect with these --rows; it has "
            f"{'; '.join(known[empty[0]])}"
        )
    return {t: of for t, of in chosen.items() if of}


def method_of(setting: str) -> str:
    """The method that has rows and a setting of this name. Raises ValueError if there is none."""
    of_setting = {name: method for method in LAYER_ROWS for name in settings_of(method)}
    if setting not in of_setting:
        raise ValueError(f"--settings={setting} must be one of {', '.join(of_setting)}")
    return of_setting[setting]


def layer_row(name: str, setting: str, files: Sequence[Path]) -> dict[str, Any]:
    """One row of the layer table: mean errors, true bits and warm seconds over layer files.

    "held_out_error" is among them where all of the files have a Hessian for it.
    """
    method = method_of(setting)
    fields = {**LAYER_ROWS[method][name]}
    rotated = fields.pop(ROTATION, False)
    settings = dataclasses.replace(settings_of(method)[setting], **fields)
    errors, others, num_bytes, values, seconds = [], [], 0, 0, 0.0
    for path in files:
        weight, hessian = load_layer(path)
        rotation = random_rotation(*weight.shape, seed=0) if rotated else None
        if rotation is not None:
            weight, hessian = rotate(weight, hessian, rotation)
        objectives = [Objective(hessian, factorize(hessian, DAMPING, path.stem))]
        for _ in range(2):  # the first time compiles
            start = time.perf_counter()
            tensor = quantize_layer(
                METHODS[method].quantize, settings, weight, objectives, jax.random.key(0)
            )
            jax.block_until_ready(tensor)
            warm = time.perf_counter() - start
        seconds += warm
        quantized = dequantize_compiled(tensor)
        if rotation is not None:
            quantized = rotate_back(quantized, rotation)
            weight, hessian = load_layer(path)
        errors.append(float(metrics.relative_error(weight, quantized, hessian)))
        held_out = load_held_out(path)
        if held_out is not None:
            others.append(float(metrics.relative_error(weight, quantized, held_out)))
        num_bytes += tensor.num_bytes
        values += weight.size
    return {
        "row": name,
        "setting": setting,
        "relative_error": geometric_mean(errors),
        **({"held_out_error": geometric_mean(others)} if len(others) == len(errors) else {}),
        "bits_per_value": 8 * num_bytes / values,
        "seconds": seconds,
    }


def model_row(name: str, base: Any, directory: Path) -> dict[str, Any]:
    """One row of the model table: a whole run, resumed or read where it was made before.

    Args:
      name: in MODEL_ROWS of its method.
      base: ConfigDict that the row changes.
      directory: of all work directories; they share its float_evaluation, which is made once.
    """
    config = base.copy_and_resolve_references()
    for field, value in MODEL_ROWS[base.method][name].items():
        if field == "calibration.num_windows":  # relative to the base
            value = int(base.calibration.num_windows * value)
        config.update_from_flattened_dict({field: value})
    path = directory / "".join(c if c.isalnum() else "_" for c in name)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        summary = job.quantize(config, str(path), str(directory / "float_evaluation"))
    write_text(path / "report.txt", printed.getvalue())
    quantized, of_float = summary["perplexity_quantized"], summary["perplexity_float"]
    evaluating = stages_of(summary).get("evaluate", {"seconds": 0.0})["seconds"]
    return {
        "row": name,
        "bits_per_value": summary["bits_per_value"],
        "perplexity_float": of_float,
        "perplexity": quantized,
        "rise": log_ratio(quantized, of_float),
        **_errors(path),
        "seconds": summary["seconds"] - evaluating,
    }


def _errors(path: Path) -> dict[str, float]:
    """Of the layers of a run, geometric means."""
    lines = read_json_lines(path / "metrics.jsonl")
    layers = [row for row in lines if row["kind"] == "layer"]
    found = {}
    for field in ("relative_error", "held_out_error"):
        if all(field in row for row in layers):
            found[field] = geometric_mean([row[field] for row in layers])
    return found


def table(rows: Sequence[dict[str, Any]], value: str) -> str:
    """Markdown, the first row being what the others are compared with.

    Args:
      rows: of one table and setting.
      value: 'relative_error' or 'rise'.
    """
    whole = value == "rise"
    fields = ["relative_error", "held_out_error"] if whole else ["held_out_error"]
    errors = [field for field in fields if all(field in row for row in rows)]
    columns = ["row", value.replace("_", " "), "against the first"]
    columns += ["perplexity"] * whole
    for field in errors:
        columns += [field.replace("_", " "), "against the first"]
    columns += ["bits per value", "seconds"]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        cells = [row["row"], f"{row[value]:.5f}", f"{_against(row, rows[0], value):.3f}"]
        cells += [f"{row['perplexity']:.2f}"] if whole else []
        for field in errors:
            cells += [f"{row[field]:.5f}", f"{_against(row, rows[0], field):.3f}"]
        lines.append([*cells, f"{row['bits_per_value']:.3f}", f"{row['seconds']:.1f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _against(row: dict[str, Any], first: dict[str, Any], value: str) -> float:
    """A value over that of the first row; inf or nan where one of them is, or the first is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.float64(row[value]) / np.float64(first[value]))


def plot(tables: dict[str, tuple[Sequence[dict[str, Any]], str]], path: Path) -> None:
    """Bars of every row against the first of its table.

    Args:
      tables: {title: (rows, value)}, as for `table`.
      path: of the PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 1 + 0.24 * max(len(rows) for rows, _ in tables.values())
    figure, all_axes = plt.subplots(
        1, len(tables), figsize=(6 * len(tables), height), layout="constrained", squeeze=False
    )
    for axes, (title, (rows, value)) in zip(all_axes[0], tables.items(), strict=True):
        ratios = [_against(row, rows[0], value) for row in rows]
        finite = [ratio for ratio in ratios if np.isfinite(ratio)] or [1.0]
        axes.barh([row["row"] for row in rows], np.nan_to_num(ratios, posinf=max(*finite, 2.0)))
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(xlabel=f"{value.replace('_', ' ')}, first row = 1", title=title)
        # Bars that are far off are cut, or the small differences would not show.
        axes.set_xlim(left=min(0.9, *finite) - 0.05, right=min(2.0, max(finite) + 0.05))
        axes.invert_yaxis()
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)
