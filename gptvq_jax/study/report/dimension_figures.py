"""SQNR against the dimension of the vectors, at equal bits: the first figure of the paper."""

import math
from collections.abc import Sequence
from typing import Any

from gptvq_jax.console.plot_style import style
from gptvq_jax.study.report.drawing import Figure
from gptvq_jax.study.report.results import Cell
from gptvq_jax.study.report.settings import alike, code_name, curve_names

_SAME_BITS = 0.08  # true bits per value that count as equal, as 2.125 and 2.162 do


def against_dimension(cells: Sequence[Cell], notes: list[str]) -> list[Figure]:
    """SQNR of the same layers against the dimension of their vectors, a line for equal bits."""
    measured = [cell for cell in cells if sqnr(cell.layers) is not None]
    groups = alike(measured, _layers_of)
    drawn = [group for group in groups if len({code_name(cell) for cell in group}) > 1]
    if not drawn:
        if len(measured) > 1:
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
            f"value are within {_SAME_BITS:g} of each other."
            + " Trellis codes, dotted, by bits L of a window: at K bits per weight it spans L / K "
            "weights." * any(map(_is_trellis, group)),
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
    curves = curve_names(group)

    def others(cell: Cell) -> str:
        """Settings that differ, but for those that bits and dimension come from."""
        return curves[cell.name].removeprefix(code_name(cell))

    lines = [line for same in alike(group, others) for line in equal_bits(same)]

    def draw(axes: Any) -> None:
        for index, line in enumerate(lines):
            low, high = mean_bits(line[0]), mean_bits(line[-1])
            bits = f"{low:.2f}" if high - low < 0.005 else f"{low:.2f} to {high:.2f}"
            for codes in alike(sorted(line, key=_place), _is_trellis):
                points = sorted((kinds.index(code_name(cell)), sqnr(cell.layers)) for cell in codes)
                trellis = _is_trellis(codes[0])
                label = f"{bits} bits{others(line[0])}{', trellis' * trellis}"
                look = style(index) | ({"linestyle": ":"} if trellis else {})
                axes.plot(*zip(*points, strict=True), label=label, **look)
        axes.set_xticks(range(len(kinds)), [kind.replace(" ", "\n", 1) for kind in kinds])
        of_trellis = "; L: bits of a window" * any(map(_is_trellis, group))
        label = f"method and dimension: weights per vector{of_trellis}"
        axes.set(xlabel=label, ylabel="mean SQNR, dB")
        axes.margins(x=0.08, y=0.08)

    return draw


def _is_trellis(cell: Cell) -> bool:
    return cell.settings.get("method") == "trellis"


def _place(cell: Cell) -> tuple[bool, int, str]:
    """Uniform grids first, then by dimension, AQLM after GPTVQ; trellis codes last, by window."""
    method, _, size = code_name(cell).partition(" ")
    digits = size.removeprefix("L=").removesuffix("D")
    number = int(digits) if digits.isdigit() else 99 if size else 0
    return _is_trellis(cell), number, method
