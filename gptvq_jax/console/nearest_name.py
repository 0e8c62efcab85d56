"""What somebody may have meant."""

import difflib
from collections.abc import Collection


def nearest_name(name: str, known: Collection[str]) -> str | None:
    """The one of `known` that is most like `name`; None if none is like it at all."""
    return next(iter(nearest_names(name, known, 1)), None)


def nearest_names(name: str, known: Collection[str], count: int) -> list[str]:
    """As many of `known` that are like `name`, the nearest first; fewer where there are fewer."""
    return difflib.get_close_matches(name, known, n=count, cutoff=0.4)
