"""What the lines of every plot look like, and ticks that say numbers."""

import math
from typing import Any

# Okabe and Ito (2008): colours that people with any colour vision tell apart. Without its yellow,
# which is too pale on white, and its black, which is too dark on black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")


def style(index: int) -> dict[str, Any]:
    """Colour and marker of a line; no two of the first 42 have both in common."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        "markersize": 4.5,
        "linewidth": 1.2,
    }


def log_ticks(axis: Any, low: float, high: float) -> None:
    """Plain numbers along a logarithmic axis of matplotlib, however short it is.

    Args:
      axis: `axes.xaxis` or `axes.yaxis`.
      low, high: least and largest value on it, above 0.
    """
    from matplotlib import ticker

    if high / low > 30:
        decades = math.log10(high / low)
        subs = (1.0, 3.0) if decades < 4 else (1.0,)
        axis.set_major_locator(ticker.LogLocator(subs=subs))
    else:
        ticks = ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        axis.set_major_locator(ticker.FixedLocator([tick for tick in ticks if tick > 0]))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())
