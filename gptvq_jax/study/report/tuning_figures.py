"""The tuning of the whole model: its loss by step, what it moved, and what a step costs."""

import statistics
from collections.abc import Sequence
from typing import Any

from gptvq_jax.console.plot_style import style
from gptvq_jax.study.report.drawing import Figure
from gptvq_jax.study.report.results import Cell

_WORDS = {
    "centroids": "centroids",
    "left": "codebook factors",
    "right": "codebook factors, shared",
    "levels": "levels",
    "row_scales": "row scales",
    "col_scales": "column scales",
    "outlier_values": "outliers",
    "block_offset": "block scales, offset",
    "block_step": "block scales, step",
    "values": "norms and biases",
}

_ON_CODES = " Where codes were chosen again, what that led to: kept, or reverted."


def of_tuning(cell: Cell, stem: str = "") -> list[Figure]:
    """The figures of a run that was tuned as a whole; none of another.

    Args:
      cell: of a run.
      stem: what names of files begin with.
    """
    figures = []
    steps = _steps(cell)
    if steps:
        figures.append(
            Figure(
                f"{stem}tuning_loss",
                "Loss by step of the tuning",
                "KL divergence of the next tokens from the float model's, nats per token: of the "
                "batch of each step, and of windows that were not tuned on."
                + (_ON_CODES if cell.recoded else ""),
                lambda axes: _loss(axes, steps, _looks(cell), _recoded(cell)),
            )
        )
    if cell.moved:
        figures.append(
            Figure(
                f"{stem}tuning_moves",
                "What the tuning moved",
                "Root mean square of what each kind of parameter of a block moved, relative to "
                "its size before.",
                lambda axes: _moves(axes, cell.moved),
            )
        )
    return figures


def tuning_line(cell: Cell) -> str | None:
    """A sentence on what a step cost, and what came of it; None: nothing was tuned."""
    steps = _steps(cell)
    if not steps:
        return None
    # The first steps have programs compiled.
    seconds = statistics.median(row["seconds"] for row in steps)
    tflop = steps[-1]["tflop"]
    text = (
        f"{len(steps)} steps of {tflop:.3g} TFLOP each, {seconds:.3g} s in the median, which is "
        f"{tflop / seconds:.3g} TFLOP/s"
    )
    looks = _looks(cell)
    if len(looks) > 1:
        best = min(looks, key=lambda row: row["held_out"])
        text += (
            f"; KL divergence on windows held out {looks[0]['held_out']:.4f} before, "
            f"{best['held_out']:.4f} after step {best['step']}, which is kept"
        )
    return f"{text}.{_codes_text(cell)}"


def _codes_text(cell: Cell) -> str:
    """A sentence on the codes that were chosen again; "" where none were."""
    times = _recoded(cell)
    if not times:
        return ""
    kept = [row for row in times if row["kept"]]
    share = sum(row["changed"] for row in kept) / max(row["vectors"] for row in times)
    gained = sum(row["held_out_before"] - row["held_out_after"] for row in kept)
    return (
        f" Codes were chosen again in {len(times)} of them and kept in {len(kept)}: in all "
        f"{100 * share:.2g} % of the vectors, and {gained:.4f} less divergence held out."
    )


def _recoded(cell: Cell) -> list[dict[str, Any]]:
    """Rows of the times that codes were chosen again; of a step that was made again, the last."""
    last = {row["step"]: row for row in cell.recoded}
    return [last[step] for step in sorted(last)]


def _steps(cell: Cell) -> list[dict[str, Any]]:
    """Rows of steps; of one that was made again after a step that was not finite, the last."""
    last = {row["step"]: row for row in cell.tuning if row.get("loss") is not None}
    return [last[step] for step in sorted(last)]


def _looks(cell: Cell) -> list[dict[str, Any]]:
    last = {row["step"]: row for row in cell.tuning if row.get("held_out") is not None}
    return [last[step] for step in sorted(last)]


def _loss(
    axes: Any,
    steps: Sequence[dict[str, Any]],
    looks: Sequence[dict[str, Any]],
    recoded: Sequence[dict[str, Any]],
) -> None:
    for index, (rows, field, label) in enumerate(
        ((steps, "loss", "tuned on"), (looks, "held_out", "held out"))
    ):
        points = [(row["step"], row[field]) for row in rows]
        look = style(index) | ({"marker": "", "linewidth": 1} if field == "loss" else {})
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **look)
    for index, (kept, label) in enumerate(((True, "codes, kept"), (False, "codes, reverted")), 2):
        points = [(row["step"], row["held_out_after"]) for row in recoded if row["kept"] == kept]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style(index) | {"linestyle": ""})
    axes.set(xlabel="step", ylabel="KL divergence, nats per token")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _moves(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    of_blocks = [(_block(row["leaf"]), row) for row in rows]
    kinds = dict.fromkeys(row["parameter"] for block, row in of_blocks if block is not None)
    for index, kind in enumerate(kinds):
        found: dict[int, list[float]] = {}
        for block, row in of_blocks:
            if block is not None and row["parameter"] == kind:
                found.setdefault(block, []).append(row["moved"])
        means = [
            (block, (sum(m * m for m in moves) / len(moves)) ** 0.5)
            for block, moves in sorted(found.items())
        ]
        label = _WORDS.get(kind, kind)
        axes.plot(*zip(*means, strict=True), label=label, **style(index))
    axes.set(xlabel="block", ylabel="relative move")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _block(leaf: str) -> int | None:
    """Of "layers_3/mlp/up_proj/kernel"; None outside the blocks."""
    first = leaf.partition("/")[0]
    number = first.removeprefix("layers_")
    return int(number) if number != first and number.isdigit() else None
