"""Quality of whole models against their true bits, and of layers against the dimension."""

import math
from collections.abc import Sequence
from typing import Any

from gptvq_jax.console.plot_style import log_ticks, style
from gptvq_jax.study.report.drawing import INK, Figure
from gptvq_jax.study.report.pareto import pareto_front
from gptvq_jax.study.report.results import Cell, named
from gptvq_jax.study.report.settings import alike, code_name, curve_names

_SAME_BITS = 0.08  # true bits per value that count as equal, as 2.125 and 2.162 do


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
                caption = f"{text}. Rings: the Pareto front, which no other cell beats in both." + (
                    " Bars: one standard error." if any(e for *_, e in points) else ""
                )
                figures.append(
                    Figure(name, title, caption, _against_bits(group, points, field, label))
                )
        if not any(cell.number("kl_mean") is not None for cell in group):
            notes.append(f"no KL divergences of {named(group)}: their figure is left out")
    return figures


def _text_of(cell: Cell) -> str:
    return str(cell.summary.get("evaluation", ""))


Point = tuple[Cell, float, float, float | None]  # bits, value, standard error if it is known


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
            _, bits, values, errors = zip(*on_curve, strict=True)
            axes.plot(bits, values, label=name, **style(index))
            bars = [error or 0.0 for error in errors]
            if any(bars):
                colour = style(index)["color"]
                axes.errorbar(bits, values, bars, fmt="none", ecolor=colour, elinewidth=1)
        values = [point[2] for point in points]
        ends = [value + (error or 0.0) for _, _, value, error in points]
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
        low, high = min(values), max(*values, *ends)
        axes.set_ylim(low / (high / low) ** 0.06 * 0.99, high * (high / low) ** 0.06 * 1.01)
        log_ticks(axes.yaxis, low, high)
        axes.margins(x=0.08)

    return draw


def against_dimension(cells: Sequence[Cell], notes: list[str]) -> list[Figure]:
    """SQNR of the same layers against the dimension of their vectors, a line for equal bits."""
    measured = [cell for cell in cells if sqnr(cell.layers) is not None]
    groups = alike(measured, _layers_of)
    drawn = [group for group in groups if len({code_name(cell) for cell in group}) > 1]
    if not drawn:
        if measured:
            notes.append(
                "no cells of the same layers that differ in dimension or method: SQNR against "
                "dimension is left out"
            )
        return []
    if len(groups) > 1:
        notes.append("cells that quantize other layers do not share a line of SQNR")
    return [
        Figure(
            f"sqnr_dimension{'' if len(drawn) == 1 else f'_{index}'}",
            "SQNR against dimension at equal bits",
            f"Mean over {len(group[0].layers)} layers. A line joins cells whose true bits per "
            f"value are within {_SAME_BITS:g} of each other.",
            _against_dimension(group),
        )
        for index, group in enumerate(drawn, 1)
    ]


def _layers_of(cell: Cell) -> Any:
    model = cell.settings.get("model")
    return model, frozenset((row.get("block"), row["layer"]) for row in cell.layers)


def sqnr(rows: Sequence[dict[str, Any]]) -> float | None:
    """Mean signal-to-quantization-noise ratio of layers in dB; None if none has a finite one."""
    errors = [row["relative_error"] for row in rows]
    ratios = [-10 * math.log10(error) for error in errors if 0 < error < math.inf]
    return sum(ratios) / len(ratios) if ratios else None


def equal_bits(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells in groups of equal bits, which lie within _SAME_BITS, from the fewest bits on."""
    groups: list[list[Cell]] = []
    for cell in sorted(cells, key=lambda cell: mean_bits(cell)):
        if groups and mean_bits(cell) - mean_bits(groups[-1][0]) <= _SAME_BITS:
            groups[-1].append(cell)
        else:
            groups.append([cell])
    return groups


def mean_bits(cell: Cell) -> float:
    """True bits per value of the whole cell, or of its layers so far."""
    whole = cell.number("bits_per_value")
    if whole is not None:
        return whole
    values = [row.get("num_values", 1) for row in cell.layers]
    bits = [row["bits_per_value"] for row in cell.layers]
    return sum(b * n for b, n in zip(bits, values, strict=True)) / sum(values)


def _against_dimension(group: Sequence[Cell]) -> Any:
    kinds = list(dict.fromkeys(code_name(cell) for cell in sorted(group, key=_place)))

    def draw(axes: Any) -> None:
        for index, line in enumerate(equal_bits(group)):
            points = sorted((kinds.index(code_name(cell)), sqnr(cell.layers)) for cell in line)
            low, high = mean_bits(line[0]), mean_bits(line[-1])
            bits = f"{low:.2f}" if high - low < 0.005 else f"{low:.2f} to {high:.2f}"
            axes.plot(*zip(*points, strict=True), label=f"{bits} bits", **style(index))
        axes.set_xticks(range(len(kinds)), [kind.replace(" ", "\n", 1) for kind in kinds])
        axes.set(xlabel="method and dimension: weights per vector", ylabel="mean SQNR, dB")
        axes.margins(x=0.08, y=0.08)

    return draw


def _place(cell: Cell) -> tuple[int, str]:
    """Uniform grids first, then by dimension, AQLM after GPTVQ."""
    name = code_name(cell)
    method, _, dim = name.partition(" ")
    digits = dim.removesuffix("D")
    return (int(digits) if digits.isdigit() else 0 if not dim else 99), method
