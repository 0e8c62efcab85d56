"""Fields of files that others wrote: what each may hold, and one line about the one that is wrong.

A table says of every field which values it takes. What has passed it can be computed with: sizes
are integers of at most 31 bits, numbers have bounds within float32, no boolean counts as either.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from gptvq_jax.console.errors import brief

_MAX_INT = 2**31 - 1
REQUIRED = object()  # in place of a default


@dataclasses.dataclass(frozen=True)
class Field:
    """What one field may hold.

    Attributes:
      text: completes the sentence "FIELD must be ...".
      accepts: whether a value other than null is one.
      default: of an absent field; without one it is required.
      null: whether null is a value too.
    """

    text: str
    accepts: Callable[[Any], bool]
    default: Any = REQUIRED
    null: bool = False

    def optional(self, default: Any = None, null: bool = True) -> "Field":
        """The same field where it may be absent, and null unless `null` is False."""
        return dataclasses.replace(self, default=default, null=null)

    def check(self, name: str, value: Any) -> Any:
        """Returns `value`; raises ValueError, which calls it `name`, if it cannot be."""
        if not (self.null if value is None else self.accepts(value)):
            raise ValueError(f"{name} must be {self.text}, got {brief(value)}")
        return value

    def read(self, fields: Mapping[str, Any], name: str) -> Any:
        """Returns the value of field `name`, or the default if it is absent.

        Raises:
          ValueError: it is required and absent, or holds what it cannot hold.
        """
        if self.default is REQUIRED and fields.get(name) is None:
            raise ValueError(f"lacks the field {name!r}")
        return self.check(name, fields[name]) if name in fields else self.default


def integer(low: int, high: int = _MAX_INT, text: str | None = None) -> Field:
    """An integer from `low` to `high`."""
    text = text or f"an integer from {low} to {high}"
    return Field(text, lambda value: is_integer(value) and low <= value <= high)


def number(low: float, high: float) -> Field:
    """An integer or a float from `low` to `high`."""
    text = f"a number from {low:g} to {high:g}"
    return Field(text, lambda value: is_number(value) and low <= value <= high)


def is_integer(value: Any) -> bool:
    """Whether it is one; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is an integer or a float."""
    return is_integer(value) or isinstance(value, float)


def token_ids(value: Any) -> tuple[int, ...]:
    """The ids that a value of SIGNED_ID or SIGNED_IDS names; null and negative ones are none."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(token for token in values if token is not None and token >= 0)


def _is_signed_id(value: Any) -> bool:
    return is_integer(value) and abs(value) <= _MAX_INT


def _is_signed_ids(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return all(map(_is_signed_id, values))


SIZE = integer(1, text="a positive integer")
EPSILON = number(1e-30, 1e3)  # of a norm
ROPE_BASE = number(1, 1e30)
ROPE_FACTOR = number(1e-6, 1e9)
FLAG = Field("true or false", lambda value: isinstance(value, bool))
TEXT = Field("a string", lambda value: isinstance(value, str))
OBJECT = Field("an object with fields", lambda value: isinstance(value, Mapping))
TOKEN_ID = integer(0, text="a token id, an integer from 0")
# Hugging Face's files may say -1 for a token that there is not; transformers never meets it.
SIGNED_ID = Field("a token id, an integer (negative: none)", _is_signed_id)
SIGNED_IDS = Field("a token id, an integer (negative: none), or a list of them", _is_signed_ids)
