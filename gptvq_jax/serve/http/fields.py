"""Fields of a request's JSON: each read once, in its type and range, and none passed over."""

import math
from collections.abc import Mapping
from typing import Any

from gptvq_jax.console.errors import brief
from gptvq_jax.console.nearest_name import nearest_name
from gptvq_jax.serve.http.errors import APIError, bad_field

# OpenAI's fields that change no text: who asks, and how their service runs and bills it.
_WITHOUT_EFFECT = {
    "metadata",
    "parallel_tool_calls",  # of tools, which are refused
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Those that would change the text, and are not supported, with the values at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}


class Fields:
    """The object that a client sent; null is as good as nothing.

    Args:
      body: of the request.
    """

    def __init__(self, body: Mapping[str, Any]):
        self._left = {name: value for name, value in body.items() if value is not None}
        self._known = [*_WITHOUT_EFFECT, *_NEUTRAL]

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a field, of any type."""
        self._known.append(name)
        return self._left.pop(name, default)

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """Raises APIError unless it is a whole number from `low` to `high`."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise bad_field(
                name, f"must be a whole number from {low} to {high}, not {brief(value)}"
            )
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Raises APIError unless it is a number from `low` to `high`."""
        value = self.take(name, default)
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or not math.isfinite(value) or not low <= value <= high:
            raise bad_field(name, f"must be a number from {low:g} to {high:g}, not {brief(value)}")
        return float(value)

    def boolean(self, name: str) -> bool:
        """False by default; raises APIError unless it is true or false."""
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise bad_field(name, f"must be true or false, not {brief(value)}")
        return value

    def text(self, name: str) -> str:
        """Raises APIError unless it is there, and a text."""
        value = self.take(name)
        if not isinstance(value, str):
            given = "is missing" if value is None else f"must be a text, not {brief(value)}"
            raise bad_field(name, given)
        return value

    def strings(self, name: str, most: int) -> tuple[str, ...]:
        """One or several texts, none empty; raises APIError for anything else."""
        value = self.take(name, [])
        values = [value] if isinstance(value, str) else value
        if (
            not isinstance(values, list)
            or len(values) > most
            or not all(isinstance(each, str) and each for each in values)
        ):
            raise bad_field(
                name, f"must be a text or up to {most} of them, none empty, not {brief(value)}"
            )
        return tuple(values)

    def finish(self) -> None:
        """Raises APIError for a field that is left and would have an effect, or is unknown."""
        for name, value in self._left.items():
            if name in _WITHOUT_EFFECT:
                continue
            if name not in _NEUTRAL:
                near = nearest_name(name, self._known)
                meant = f"; the nearest is {near!r}" if near else ""
                raise APIError(400, f"there is no field {brief(name)}{meant}", name)
            if not any(_same(value, neutral) for neutral in _NEUTRAL[name]):
                raise bad_field(
                    name, f"= {brief(value)} is not supported; leave it out", "unsupported_value"
                )


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)
