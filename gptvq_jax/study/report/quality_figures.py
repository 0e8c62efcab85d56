"""Perplexity and KL divergence of whole models against their true bits per value."""

import math
from collections.abc import Sequence
from typing import Any

from gptvq_jax.console.plot_style import log_ticks, style
from gptvq_jax.study.report.drawing import INK, Figure
from gptvq_jax.study.report.pareto import pareto_front
from gptvq_jax.study.report.results import Cell, named
from gptvq_jax.study.report.settings import alike, curve_names


def against_bits(cells: Sequence[Cell], notes: list[str]) -> list[Figure]:
    """Perplexity and KL divergence against bits per value, of models on the same text.

    Args:
      cells: of any kind; those without the number are left out.
      notes: gets a line for what is missing.
    """
    finished = [cell for cell in cells if cell.number("perplexity_quantized") is not None]
    if not finished:
        notes.append("no perplexities: the figures against bits per value are left out")
        return []
    groups = alike(finished, lambda cell: (cell.settings.get("model"), _text_of(cell)))
    if len(groups) > 1:
        notes.append(
            f"models or evaluations differ in {len(groups)} ways: each has figures of its own"
        )
    figures = []
    for index, group in enumerate(groups, 1):
        number = f"_{index}" if len(groups) > 1 else ""
        text = f"{group[0].settings.get('model', '')}, {_text_of(group[0])}".strip(", ")
        for field, title, label in (
            ("perplexity_quantized", "Perplexity against bits", "perplexity"),
            ("kl_mean", "KL divergence against bits", "mean KL, nats per token"),
        ):
            points = _points(group, field, notes)
            if points:
                name = f"{field.partition('_')[0]}_bits{number}"
                caption = f"{text}. Rings: the Pareto front, which no other cell beats in both."
                caption += " Bars: one standard error." if any(e for *_, e in points) else ""
                if any(_is_cut(point) for point in points):
                    caption += " An arrow: the bar goes on below a tenth of the value."
                figures.append(
                    Figure(name, title, caption, _against_bits(group, points, field, label))
                )
        if not any(cell.number("kl_mean") is not None for cell in group):
            notes.append(f"no KL divergences of {named(group)}: their figure is left out")
    return figures


def _text_of(cell: Cell) -> str:
    return str(cell.summary.get("evaluation", ""))


Point = tuple[Cell, float, float, float | None]  # bits, value, standard error if it is known


def _low_end(point: Point) -> float:
    """Of the bar; a logarithmic axis has no place for 0, nor much for what is close to it."""
    _, _, value, error = point
    return max(value - (error or 0.0), value / 10)


def _is_cut(point: Point) -> bool:
    return point[2] - (point[3] or 0.0) < _low_end(point)


def _points(group: Sequence[Cell], field: str, notes: list[str]) -> list[Point]:
    points = []
    for cell in group:
        bits, value = cell.number("bits_per_value"), cell.number(field)
        if bits is None or value is None:
            continue
        if not (math.isfinite(value) and math.isfinite(bits) and value > 0):
            notes.append(f"{cell.name}: {field}={value:g} has no place on its figure")
            continue
        name = "perplexity" if field.startswith("perplexity") else field
        error = cell.standard_error(name)
        points.append((cell, bits, value, error if error and math.isfinite(error) else None))
    return points


def _against_bits(group: Sequence[Cell], points: Sequence[Point], field: str, label: str) -> Any:
    """What draws a curve for each method and dimension, the front and the float line."""
    curves = curve_names(group)

    def draw(axes: Any) -> None:
        for index, name in enumerate(dict.fromkeys(curves[point[0].name] for point in points)):
            on_curve = sorted((p for p in points if curves[p[0].name] == name), key=lambda p: p[1])
            _, bits, values, _ = zip(*on_curve, strict=True)
            axes.plot(bits, values, label=name, **style(index))
            _bars(axes, [point for point in on_curve if point[3]], style(index)["color"])
        values = [point[2] for point in points]
        ends = [end for point in points for end in (_low_end(point), point[2] + (point[3] or 0.0))]
        front = pareto_front([(bits, value) for _, bits, value, _ in points])
        axes.plot(
            [points[place][1] for place in front],
            [points[place][2] for place in front],
            color=INK,
            linestyle=":",
            linewidth=1,
            marker="o",
            markersize=10,
            markerfacecolor="none",
            label="Pareto front",
            zorder=1,
        )
        floats = {cell.number("perplexity_float") for cell, *_ in points}
        if field.startswith("perplexity"):
            floats = {value for value in floats if value and math.isfinite(value)}
            if floats:
                line = sum(floats) / len(floats)
                values.append(line)
                axes.axhline(
                    line, color=INK, linestyle="--", linewidth=1, label=f"float {line:.4g}"
                )
        axes.set(xlabel="bits per value, codebooks included", ylabel=label, yscale="log")
        low, high = min(*values, *ends), max(*values, *ends)
        axes.set_ylim(low / (high / low) ** 0.06 * 0.99, high * (high / low) ** 0.06 * 1.01)
        log_ticks(axes.yaxis, low, high)
        axes.margins(x=0.08)

    return draw


def _bars(axes: Any, points: Sequence[Point], colour: str) -> None:
    """One standard error up and down; an arrow where it goes down further than is drawn."""
    if not points:
        return
    _, bits, values, errors = zip(*points, strict=True)
    down = [value - _low_end(point) for value, point in zip(values, points, strict=True)]
    axes.errorbar(
        bits, values, [down, errors], fmt="none", ecolor=colour, elinewidth=1, capsize=2.5
    )
    cut = [point for point in points if _is_cut(point)]
    if cut:
        axes.plot(
            [point[1] for point in cut],
            [_low_end(point) for point in cut],
            color=colour,
            linestyle="none",
            marker="v",
            markersize=7,
        )
