"""What somebody may have meant."""

import difflib
from collections.abc import Collection


def nearest_name(name: str, known: Collection[str]) -> str | None:
    """The one of `known` that is most like `name`; None if none is like it at all."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.4)), None)
