"""Errors, bits and codes of layers: of one cell by depth, of several side by side."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from gptvq_jax.console.layer_kind import layer_kind
from gptvq_jax.console.layer_plot import by_depth, codes_differ, tuning_by_depth
from gptvq_jax.console.plot_style import log_ticks, style
from gptvq_jax.console.recipe_text import by_rule, rules_of
from gptvq_jax.study.report.drawing import INK, Figure, shortened
from gptvq_jax.study.report.results import Cell, named

Row = dict[str, Any]


def of_one(cell: Cell, stem: str) -> list[Figure]:
    """What a single run looks like from its first block to its last.

    Args:
      cell: of a run, with layers.
      stem: what names of files begin with.
    """
    rows, depth = cell.layers, {row["block"] for row in cell.layers}
    of_blocks = f"{len(rows)} layers of {len(depth)} blocks"
    figures = [
        Figure(
            f"{stem}error",
            "Error by layer and depth",
            f"{of_blocks}; squared error of a layer's output over the squared output, on the "
            "calibration text.",
            lambda axes: by_depth(axes, rows, "relative_error", "relative output error", "log"),
        )
    ]
    judged = [row for row in rows if row.get("held_out_error") is not None]
    if judged:
        figures.append(
            Figure(
                f"{stem}held_out",
                "The same on held-out windows",
                "Calibration windows from the end of the text, which no codebook was fitted to.",
                lambda axes: by_depth(axes, judged, "held_out_error", "held-out error", "log"),
            )
        )
    if codes_differ(rows):
        figures.append(
            Figure(
                f"{stem}bits",
                "Bits by layer",
                "True bits of each layer, codebooks and scales included.",
                lambda axes: by_depth(axes, rows, "bits_per_value", "bits per value"),
            )
        )
    if rules_of(rows):
        kinds = len({row["layer"] for row in rows})
        figures.append(
            Figure(
                f"{stem}rules",
                "Rules of the recipe",
                "Which rule took each layer, by block.",
                lambda axes: by_rule(axes, rows),
                rows=kinds,
            )
        )
    counted = _counted(rows)
    if _enough_unused(counted):
        figures.append(
            Figure(
                f"{stem}unused",
                "Unused centroids",
                "Centroids of a layer that no vector uses.",
                lambda axes: by_depth(
                    axes, counted, "unused_centroids", "unused centroids", count=True
                ),
            )
        )
    if cell.blocks:
        figures.append(
            Figure(
                f"{stem}tuning",
                "Blocks before and after their tuning",
                "Relative error of a block's outputs, on windows that it was not tuned on.",
                lambda axes: tuning_by_depth(axes, cell.blocks),
            )
        )
    return figures


def unused_line(cell: Cell) -> str | None:
    """A sentence in place of the figure of unused centroids; None where they have that."""
    rows = _counted(cell.layers)
    if not rows or _enough_unused(rows):
        return None
    total = sum(row["unused_centroids"] for row in rows)
    if not total:
        return "Every centroid is used."
    worst = max(rows, key=lambda row: row["unused_centroids"])
    centroids = "1 centroid is" if total == 1 else f"{total} centroids are"
    layers = sum(row["unused_centroids"] > 0 for row in rows)
    return (
        f"{centroids} unused, in {layers} of {len(rows)} layers; the most, "
        f"{worst['unused_centroids']}, in {worst['layer']} of block {worst['block']}."
    )


def experts_line(cell: Cell) -> str | None:
    """A sentence on layers of experts that share a Hessian with others; None: there are none."""
    of_experts = [row for row in cell.layers if row.get("expert_tokens") is not None]
    shared = [row for row in of_experts if row.get("shared_hessian")]
    if not shared:
        return None
    none = sum(not row["expert_tokens"] for row in shared)
    return (
        f"{len(shared)} of {len(of_experts)} layers of experts got too few calibration tokens for "
        f"a Hessian of their own, {none} of them none, and share in that of all experts of their "
        "block."
    )


def _counted(rows: Sequence[Row]) -> list[Row]:
    """Rows that say how many centroids are unused, as those of old runs do not."""
    return [row for row in rows if row.get("unused_centroids") is not None]


def _enough_unused(rows: Sequence[Row]) -> bool:
    """Whether a figure has more to say than a sentence: a layer has one on average, or more."""
    return bool(rows) and sum(row["unused_centroids"] for row in rows) >= len(rows)


def side_by_side(cells: Sequence[Cell], notes: list[str]) -> list[Figure]:
    """Errors of several cells by kind of layer and by depth."""
    cells = [cell for cell in cells if cell.layers]
    kinds = list(dict.fromkeys(layer_kind(row["layer"]) for cell in cells for row in cell.layers))
    figures = [
        Figure(
            "error_layers",
            "Error by layer",
            "Geometric mean over the depth, where there are several blocks, and over experts.",
            _lines(
                cells, kinds, lambda row: layer_kind(row["layer"]), "layer", names=_short(kinds)
            ),
        )
    ]
    deep = [cell for cell in cells if all("block" in row for row in cell.layers)]
    if deep:
        depth = sorted({row["block"] for cell in deep for row in cell.layers})
        figures.append(
            Figure(
                "error_depth",
                "Error by depth",
                "Geometric mean over the layers of a block.",
                _lines(deep, depth, lambda row: row["block"], "block", names=()),
            )
        )
    else:
        notes.append("layers without a block: error by depth is left out")
    return figures


def _short(names: Sequence[str]) -> list[str]:
    """Names of layers without the part of the block they are in, where they still differ."""
    last = [name.rpartition("/")[2] for name in names]
    return shortened(last if len(set(last)) == len(last) else names, 18)


def _lines(
    cells: Sequence[Cell],
    places: Sequence[Any],
    place_of: Callable[[Row], Any],
    label: str,
    names: Sequence[str],
) -> Callable[[Any], None]:
    """What draws a line for each cell over places, which are numbers unless they have names."""

    def draw(axes: Any) -> None:
        drawn = []
        for index, cell in enumerate(cells):
            means = [
                geometric_mean([r["relative_error"] for r in cell.layers if place_of(r) == place])
                for place in places
            ]
            points = [(x, y) for x, y in enumerate(means) if y is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=cell.name, **style(index))
                drawn += [y for _, y in points]
        if names:
            axes.set_xticks(range(len(places)), names, rotation=35, ha="right")
        else:
            step = -(-len(places) // 10)
            axes.set_xticks(range(0, len(places), step), [str(p) for p in places[::step]])
        axes.set(xlabel=label, ylabel="relative output error", yscale="log")
        if drawn:
            log_ticks(axes.yaxis, min(drawn), max(drawn))

    return draw


def geometric_mean(values: Sequence[float]) -> float | None:
    """Of those that are above 0 and finite; None if none is."""
    logs = [math.log(value) for value in values if 0 < value < math.inf]
    return math.exp(sum(logs) / len(logs)) if logs else None


def code_usage(cells: Sequence[Cell], notes: list[str]) -> list[Figure]:
    """How much of their bits the codes use: entropy against index bits, a point for each layer."""
    found = {
        cell.name: [row for row in cell.layers if row.get("code_entropy") is not None]
        for cell in cells
    }
    without = [cell for cell in cells if cell.layers and not found[cell.name]]
    if without:
        notes.append(f"no code entropy in {named(without)}: it is left out of code usage")
    found = {name: rows for name, rows in found.items() if rows}
    if not found:
        return []

    def draw(axes: Any) -> None:
        both = []
        for index, (name, rows) in enumerate(found.items()):
            bits = [row["index_bits"] for row in rows]
            entropy = [row["code_entropy"] for row in rows]
            look = {**style(index), "linestyle": "none", "markersize": 3.5}
            look |= {"markerfacecolor": "none"}  # what lies under others is seen
            axes.plot(bits, entropy, label=name, **look)
            both += [*bits, *entropy]
        ends = [min(both) - 0.3, max(both) + 0.3]
        axes.plot(ends, ends, color=INK, linestyle="--", linewidth=1, label="all codes as often")
        axes.set(xlabel="index bits per code", ylabel="entropy, bits per code")
        axes.xaxis.get_major_locator().set_params(integer=True)

    caption = "Entropy of the codes of each layer, mean over its codebooks."
    return [Figure("code_usage", "Code usage", caption, draw)]
