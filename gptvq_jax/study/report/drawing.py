"""A figure: what it shows, and how it becomes SVG and PNG.

It is drawn for the width of a phone, WIDTH units of which the text has 11, and scaled up where
there is room. In the page, text and axes take the colour of the page's text.
"""

import html
import io
import os
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

WIDTH = 380  # points, and pixels of an SVG that is not scaled
_HEIGHT, _TEXT = 270, 11
INK = "#1b1b1c"  # of text and axes: in the page, the colour of its text
_STYLE = {
    "font.size": _TEXT,
    "axes.titlesize": _TEXT,
    "legend.fontsize": _TEXT,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "text.color": INK,
    "text.parse_math": False,  # names of cells may have a $ in them
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.2,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "gptvq_jax",  # the same figure is the same file
}


class Figure(NamedTuple):
    """One figure of the report."""

    name: str  # of its files, and of its place in the page
    title: str
    caption: str
    draw: Callable[[Any], None]  # on axes of matplotlib
    rows: int = 0  # of a figure that has a line of text for each of so many things


class Files(NamedTuple):
    """A figure as it is stored and shown."""

    svg: str  # with its own colours
    png: bytes
    inline: str  # an <svg> element for the page


def render(figure: Figure) -> Files:
    """Draws a figure."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the PNG's font may lack a letter
        canvas = Canvas(layout="constrained", facecolor="none")
        axes = canvas.subplots()
        axes.set_facecolor("none")
        axes.grid()
        axes.set_axisbelow(True)
        figure.draw(axes)
        lines = _legend(canvas, axes)
        height = (figure.rows * 20 + 60 if figure.rows else _HEIGHT) + 17 * lines
        canvas.set_size_inches(WIDTH / 72, height / 72)
        text, image = io.StringIO(), io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(text, format="svg", metadata=nothing)
        canvas.savefig(image, format="png", dpi=160, facecolor="white")
    svg = text.getvalue()
    paper = f'<svg style="background:#ffffff;color:{INK}" '
    return Files(svg.replace("<svg ", paper, 1), image.getvalue(), _inline(svg, figure))


_CUT = "\N{HORIZONTAL ELLIPSIS}"


def shortened(names: Sequence[str], length: int) -> list[str]:
    """Names of at most so many letters, which differ where the names do.

    Where one is too long, all lose what they begin with together; what is too long still is cut in
    the middle, and where two become one they are numbered.
    """
    if max(map(len, names), default=0) <= length:
        return list(names)
    start = len(os.path.commonprefix(list(names))) if len(names) > 1 else 0
    texts = [f"{_CUT}{name[start:]}" if start > 1 else name for name in names]
    half = (length - 1) // 2
    short = [t if len(t) <= length else f"{t[:half]}{_CUT}{t[-half:]}" for t in texts]
    if len(set(short)) == len(set(names)):
        return short
    width = len(str(len(names))) + 2
    return [f"{place}: {text[-(length - width) :]}" for place, text in enumerate(texts, 1)]


def _legend(canvas: Any, axes: Any) -> int:
    """Puts the names of lines below the axes, where they cover nothing; returns their lines."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return 0
    labels = shortened(labels, 44)
    columns = max(1, min(len(labels), 52 // (max(map(len, labels)) + 6)))
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns)
    return -(-len(labels) // columns)


def _inline(svg: str, figure: Figure) -> str:
    """The element for the page: no size of its own, the page's colour, names used nowhere else."""
    svg = svg[svg.index("<svg ") :].replace(INK, "currentColor")
    label = html.escape(figure.title)
    start = f'<svg role="img" aria-label="{label}" '
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    svg = svg.replace("<svg ", start, 1)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{figure.name}-", svg)
