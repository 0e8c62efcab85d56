"""Which rule of a recipe took which layer, as a table and as a picture."""

from collections.abc import Sequence
from typing import Any

from gptvq_jax.console.plot_style import style

Rows = Sequence[dict[str, Any]]  # of layers, of the embedding and the head: metrics.jsonl
NO_RULE = "no rule"


def rule_of_row(row: dict[str, Any]) -> str:
    """The rule in one line, with its number."""
    return row.get("rule") or NO_RULE


def rules_of(rows: Rows) -> list[str]:
    """Rules that took a row, in the order of the recipe, and last NO_RULE; [] without a recipe."""
    found = {rule_of_row(row) for row in rows if "rule" in row}
    numbers = {rule: rule.partition(".")[0] for rule in found - {NO_RULE}}
    ordered = sorted(numbers, key=lambda rule: (len(numbers[rule]), rule))
    return [*ordered, *(found & {NO_RULE})]


def rule_number(row: dict[str, Any]) -> str:
    """Of the rule that took a row; "-" where none did."""
    rule = rule_of_row(row)
    return "-" if rule == NO_RULE else rule.partition(".")[0]


def rule_lines(rows: Rows) -> list[str]:
    """A line for each rule: what it took, with its bits; [] without a recipe."""
    lines = []
    for rule in rules_of(rows):
        own = [row for row in rows if rule_of_row(row) == rule]
        values = sum(row["num_values"] for row in own)
        bits = sum(row["bits_per_value"] * row["num_values"] for row in own) / values
        outer = [row["layer"] for row in own if row.get("kind") == "outer"]
        layers = len(own) - len(outer)
        parts = [f"{layers} layer{'s' * (layers != 1)}"] * (layers > 0) + outer
        lines.append(f"{rule} ({', '.join(parts)}; {bits:.4f} bits per value)")
    return lines


def by_rule(axes: Any, rows: Rows) -> None:
    """A square for each layer, by block and kind of layer, in the look of its rule.

    Args:
      axes: of matplotlib.
      rows: of layers of blocks.
    """
    kinds = list(dict.fromkeys(row["layer"] for row in rows))[::-1]
    for index, rule in enumerate(rules_of(rows)):
        own = [row for row in rows if rule_of_row(row) == rule]
        points = [(row["block"], kinds.index(row["layer"])) for row in own]
        look = {**style(index), "linestyle": "none"}
        axes.plot(*zip(*points, strict=True), label=rule, **look)
    axes.set(xlabel="block", yticks=range(len(kinds)), yticklabels=kinds)
    axes.set_ylim(-0.7, len(kinds) - 0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
