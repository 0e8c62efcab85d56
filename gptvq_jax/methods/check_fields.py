"""How settings refuse a value: one line with the field, as the command line has it, and the fix."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any


def field_check(settings: Any, section: str = "") -> Callable[[bool, str, str], None]:
    """A function of (ok, field, allowed) that raises a ValueError unless `ok`.

    Args:
      settings: whose fields they are, one inside another by a dot.
      section: of the config that has the settings.
    """
    before = f"{section}." if section else ""

    def check(ok: bool, field: str, allowed: str) -> None:
        if not ok:
            value = attrgetter(field)(settings)
            raise ValueError(f"{before}{field}={value!r} must be {allowed}")

    return check
