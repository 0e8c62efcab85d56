"""The page: one HTML file with its figures in it, which loads nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gptvq_jax.console.comparison_text import protocol_text
from gptvq_jax.study.report.drawing import Figure
from gptvq_jax.study.report.html_text import Markup, element, join
from gptvq_jax.study.report.results import Cell
from gptvq_jax.study.report.settings import common
from gptvq_jax.study.report.table import cells_table, commands, settings_list

Said = Mapping[str, Mapping[str, str]]  # {prompt: {model: what it says}}


class Section(NamedTuple):
    """Figures under one heading, and sentences before them."""

    title: str
    figures: Sequence[Figure]
    folded: bool = False
    lines: Sequence[str] = ()


def page(
    title: str,
    cells: Sequence[Cell],
    sections: Sequence[Section],
    drawn: Mapping[str, str],
    said: Said,
    notes: Sequence[str],
) -> str:
    """The whole document.

    Args:
      title: of the page.
      cells: rows of its table.
      sections: of figures, in order; empty ones are left out.
      drawn: {name of a figure: its <svg> element}.
      said: continuations of prompts.
      notes: what is missing, a line each.
    """
    here = Path(__file__)
    css, script = (Markup(here.with_name(f"page.{kind}").read_text()) for kind in ("css", "js"))
    head = element(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        element("style", css),
    )
    body = element(
        "body",
        element("h1", title),
        *(element("p", line, class_="soft") for line in protocols(cells)),
        *_missing(notes),
        element("h2", "Cells" if len(cells) > 1 else "The run"),
        cells_table(cells),
        commands(cells),
        *_common(cells),
        *(_section(section, drawn) for section in sections if section.figures),
        *_said(said),
        element("script", script),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def protocols(cells: Sequence[Cell]) -> list[str]:
    """What the numbers were measured on, a line for each way."""
    lines = []
    for cell in cells:
        parts = [
            f"{name} {cell.summary[name]}"
            for name in ("calibration", "evaluation")
            if cell.summary.get(name)
        ]
        if cell.summary.get("processor"):
            parts.append(f"on {cell.summary['processor']}")
        sentences = ["; ".join(parts)] if parts else []
        if "protocol" in cell.summary:
            sentences.append(f"protocol: {protocol_text(cell.summary['protocol'])}")
        lines.append(" ".join(f"{text[0].upper()}{text[1:]}." for text in sentences))
    return [line for line in dict.fromkeys(lines) if line]


def _missing(notes: Sequence[str]) -> list[Markup]:
    if not notes:
        return []
    items = element("ul", *(element("li", note) for note in notes), class_="missing")
    return [element("h2", "What is missing"), items]


def _common(cells: Sequence[Cell]) -> list[Markup]:
    shared = common(cells)
    if not shared:
        return []
    of = "that all cells share and" if len(cells) > 1 else "of the run"
    summary = element("summary", f"Settings {of} that are not the defaults")
    return [element("details", summary, settings_list(shared))]


def _section(section: Section, drawn: Mapping[str, str]) -> Markup:
    lines = (element("p", line, class_="soft") for line in section.lines)
    figures = element(
        "div",
        *(_figure(figure, drawn[figure.name]) for figure in section.figures),
        class_="figures",
    )
    if section.folded:
        return element("details", element("summary", section.title), *lines, figures)
    return join(element("h2", section.title), *lines, figures)


def _figure(figure: Figure, svg: str) -> Markup:
    links = [
        element("a", kind.upper(), href=f"figures/{figure.name}.{kind}") for kind in ("svg", "png")
    ]
    caption = element("figcaption", figure.caption, " ", links[0], " ", links[1])
    return element("figure", element("h3", figure.title), Markup(svg), caption, id=figure.name)


def _said(said: Said) -> list[Markup]:
    if not said:
        return []
    parts = [element("h2", "What the models say")]
    parts.append(
        element("p", "Each continues the prompt with its likeliest tokens.", class_="soft")
    )
    for prompt, by_model in said.items():
        parts.append(element("h3", prompt))
        lines = (
            join(element("dt", m), element("dd", text.strip() or "(nothing)"))
            for m, text in by_model.items()
        )
        parts.append(element("dl", *lines, class_="said"))
    return parts
