"""What other libraries' exceptions have to say, in one line."""

import reprlib
from typing import Any


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def brief(value: Any) -> str:
    """A value as Python writes it, in one line, cut where it is long: for values of files."""
    return _BRIEF.repr(value)


_BRIEF = reprlib.Repr()
_BRIEF.maxdict, _BRIEF.maxlevel, _BRIEF.maxother, _BRIEF.maxstring = 8, 3, 200, 200
