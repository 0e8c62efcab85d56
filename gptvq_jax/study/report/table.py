"""The table of cells: what differs between them and what came out; the command of each."""

import html
import math
import re
from collections.abc import Callable, Sequence

from gptvq_jax.study.report.dimension_figures import mean_bits, sqnr
from gptvq_jax.study.report.html_text import Markup, element, join
from gptvq_jax.study.report.layer_figures import geometric_mean
from gptvq_jax.study.report.results import Cell
from gptvq_jax.study.report.settings import columns, settings_of

# Title, form, and the number of a cell, or None.
_NUMBERS: tuple[tuple[str, str, Callable[[Cell], float | None]], ...] = (
    (
        "bits per value",
        ".4f",
        lambda cell: mean_bits(cell) if cell.layers or cell.summary else None,
    ),
    ("perplexity", ".3f", lambda cell: cell.number("perplexity_quantized")),
    ("float perplexity", ".3f", lambda cell: cell.number("perplexity_float")),
    ("mean KL, nats/token", ".4g", lambda cell: cell.number("kl_mean")),
    ("99 % KL, nats/token", ".4g", lambda cell: cell.number("kl_99")),
    ("same top-1", ".2%", lambda cell: cell.number("same_top1")),
    ("mean SQNR, dB", ".2f", lambda cell: sqnr(cell.layers)),
    (
        "relative error",
        ".4g",
        lambda cell: geometric_mean([row["relative_error"] for row in cell.layers]),
    ),
    ("held-out error", ".4g", lambda cell: held_out_error(cell)),
    ("unused centroids", "d", lambda cell: _unused(cell)),
    ("seconds", ".1f", lambda cell: cell.number("seconds")),
)
_WITH_ERROR = {"perplexity": "perplexity", "mean KL, nats/token": "kl_mean"}


def _unused(cell: Cell) -> int | None:
    counts = [row["unused_centroids"] for row in cell.layers if "unused_centroids" in row]
    return sum(counts) if counts else None


def held_out_error(cell: Cell) -> float | None:
    """Geometric mean on calibration windows that nothing was fitted to; of a run, if it has any."""
    errors = [row.get("held_out_error") for row in cell.layers]
    return None if None in errors else geometric_mean(errors)


def cells_table(cells: Sequence[Cell]) -> Markup:
    """Columns that have nothing in any row are left out."""
    axes, fields = columns(cells)
    numbers = [column for column in _NUMBERS if any(column[2](cell) is not None for cell in cells)]
    titles = ["cell", "state", *axes, *fields, *(title for title, *_ in numbers)]
    rows = []
    for cell in cells:
        settings = settings_of(cell)
        rows.append(
            element(
                "tr",
                element("th", cell.name, scope="row"),
                element("td", cell.status, class_="short"),
                *(element("td", cell.point.get(axis, "")) for axis in axes),
                *(element("td", settings.get(field, "")) for field in fields),
                *(_number(cell, *column) for column in numbers),
            )
        )
    head = (
        element("th", element("button", _breakable(title), type="button"), scope="col")
        for title in titles
    )
    table = element(
        "table", element("thead", element("tr", *head)), element("tbody", *rows), class_="sortable"
    )
    return element("div", table, class_="wide", tabindex="0", role="region", aria_label="cells")


def _breakable(title: str) -> Markup:
    """A title that may go on in the next line after a dot or an underscore."""
    parts = re.split(r"(?<=[._])", title)
    return Markup("<wbr>".join(html.escape(part) for part in parts))


def commands(cells: Sequence[Cell]) -> Markup:
    """The command of each cell; folded where there are several."""
    if len(cells) == 1:
        return element("p", element("code", cells[0].command or "command not noted"))
    lines = (
        join(element("dt", cell.name), element("dd", element("code", cell.command or "not noted")))
        for cell in cells
    )
    commands_list = element("dl", *lines, class_="set")
    return element("details", element("summary", "The command of each cell"), commands_list)


def _number(
    cell: Cell, title: str, form: str, number: Callable[[Cell], float | None]
) -> Markup:  # fmt: skip
    value = number(cell)
    if value is None:
        return element("td", "")
    shown = format(value, form) if math.isfinite(value) else str(value)
    error = cell.standard_error(_WITH_ERROR[title]) if title in _WITH_ERROR else None
    if error is not None:
        shown += f" \N{PLUS-MINUS SIGN} {error:.2g}"
    return element("td", shown, class_="number", data_sort=repr(float(value)))


def settings_list(settings: dict[str, str]) -> Markup:
    """Fields and values."""
    return element(
        "dl", *(join(element("dt", n), element("dd", v)) for n, v in settings.items()), class_="set"
    )
