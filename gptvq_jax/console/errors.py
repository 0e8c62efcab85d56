"""What other libraries' exceptions and anyone's files have to say, in one line."""

import reprlib
from typing import Any


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def brief(value: Any) -> str:
    """A value as Python writes it, in one line, cut where it is long: for values of files."""
    return _BRIEF.repr(value)


def printable(text: str) -> str:
    """A text in one line, with nothing in it that a terminal or an SVG file could not hold."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


_BRIEF = reprlib.Repr()
_BRIEF.maxdict, _BRIEF.maxlevel, _BRIEF.maxother, _BRIEF.maxstring = 8, 3, 200, 200
