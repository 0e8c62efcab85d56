"""The picture of a run, report.png; scripts/report.py draws the same panels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptvq_jax.console.layer_kind import layer_kind
from gptvq_jax.console.plot_style import log_ticks, style
from gptvq_jax.console.recipe_text import by_rule, rules_of
from gptvq_jax.files.durable import replacing

Rows = Sequence[dict[str, Any]]  # of a work directory's metrics.jsonl


def plot(rows: Rows, title: str, path: Path, tuned: Rows = ()) -> None:
    """Relative output error against depth, one line per kind of layer.

    Further panels show the bits of the layers if they differ, the rules of a recipe that took them,
    and the errors of whole blocks before and after their tuning, `tuned`, if there were these.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    of_rules = bool(rules_of(rows))
    panels = [("relative_error", "relative output error", "log")]
    if codes_differ(rows):
        panels.append(("bits_per_value", "bits per value", "linear"))
    count = len(panels) + of_rules + bool(tuned)
    figure, all_axes = plt.subplots(
        count, 1, figsize=(8, 4.2 * count), layout="constrained", squeeze=False
    )
    for axes, panel in zip(all_axes[:, 0], panels, strict=False):
        by_depth(axes, rows, *panel)
    if of_rules:
        axes = all_axes[len(panels), 0]
        by_rule(axes, rows)
        below = {"loc": "upper left", "bbox_to_anchor": (0, -0.14)}
        for text in axes.legend(fontsize="small", **below).get_texts():
            text.set_parse_math(False)  # a pattern may have a $ in it
    if tuned:
        tuning_by_depth(all_axes[-1, 0], tuned)
        all_axes[-1, 0].legend(fontsize="small")
    for axes in all_axes[:, 0]:
        axes.grid(alpha=0.3)
    all_axes[0, 0].legend(fontsize="small", ncols=2)
    all_axes[0, 0].set_title(title)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)


def codes_differ(rows: Rows) -> bool:
    """Whether not all layers have codes of the same method, bits and dimension."""
    return len({(row.get("method"), row["dim"], row["index_bits"]) for row in rows}) > 1


def by_depth(
    axes: Any, rows: Rows, field: str, label: str, scale: str = "linear", count: bool = False
) -> None:
    """One line for each kind of layer: a field of its rows against the block, mean over experts.

    Args:
      axes: of matplotlib.
      rows: of layers.
      field: of a row.
      label: what it is, with its unit.
      scale: "linear", or "log", on which a value of 0 has no place and is left out.
      count: whether it is a whole number, between which the axis has no ticks.
    """
    log = scale == "log"
    kinds: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        of_block = kinds.setdefault(layer_kind(row["layer"]), {}).setdefault(row["block"], [])
        if row[field] > 0 or not log:
            of_block.append(row[field])
    for index, (name, blocks) in enumerate(kinds.items()):
        points = [(block, sum(of) / len(of)) for block, of in blocks.items() if of]
        axes.plot(*zip(*points, strict=True) if points else ([], []), label=name, **style(index))
    axes.set(yscale=scale, ylabel=label)
    if count:
        axes.yaxis.get_major_locator().set_params(integer=True)
    _blocks(axes)
    values = [row[field] for row in rows if row[field] > 0]
    if log and values:
        log_ticks(axes.yaxis, min(values), max(values))


def tuning_by_depth(axes: Any, tuned: Rows) -> None:
    """Two lines: held-out errors of blocks before and after their tuning."""
    blocks, errors = [row["block"] for row in tuned], []
    for index, (when, label) in enumerate([("before", "quantized"), ("after", "and tuned")]):
        of_blocks = [row[f"tune_error_{when}"] for row in tuned]
        axes.plot(blocks, of_blocks, label=label, **style(index))
        errors += [error for error in of_blocks if error > 0]
    axes.set(yscale="log", ylabel="held-out error of the block")
    _blocks(axes)
    if errors:
        log_ticks(axes.yaxis, min(errors), max(errors))


def _blocks(axes: Any) -> None:
    axes.set(xlabel="block")
    axes.xaxis.get_major_locator().set_params(integer=True)
