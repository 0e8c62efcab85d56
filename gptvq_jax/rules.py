"""Rules: which layer of a model gets which settings, by its name.

A rule is a pair (pattern, overrides), such as (".*/down_proj", {"bits": 4.0}). The first rule whose
pattern, a regular expression, matches the whole name of a layer is that layer's. Overrides are a
method, as text, or a dict of `method` and fields of that method's settings. Beside the METHODS
there are 'dense', which a layer stays, and 'int8', rows of 8 bits with one scale each.

A run has them in its config (recipe.py), a Flax model as an argument (flax_tree/rules.py): `given`
is what messages call them, "config.recipe" or "rules".
"""

import contextlib
import math
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gptvq_jax.console.nearest_name import nearest_name, nearest_names
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.methods.uniform import UniformSettings

DENSE, INT8 = "dense", "int8"
INT8_ROWS = UniformSettings(bits=8, group_size=0, symmetric=True)  # what INT8 stands for
_EXAMPLE = "(('lm_head', 'int8'), ('.*/down_proj', {'bits': 4.0}))"
_NAMED = 4  # names in a message, at most


class Rule(NamedTuple):
    """A pattern for whole names of layers, and what it sets of them."""

    pattern: str
    overrides: tuple[tuple[str, Any], ...]  # fields and values; hashable

    def matches(self, name: str) -> bool:
        return re.fullmatch(self.pattern, name) is not None

    def method(self, default: str) -> Any:
        """The one that it names, or else the default; `fields_of` checks it."""
        return dict(self.overrides).get("method", default)


def parse_rules(given: str, value: Any) -> tuple[Rule, ...]:
    """Rules of plain values.

    Args:
      given: what they are, for messages.
      value: a tuple or list of pairs.

    Raises:
      ValueError: it is no sequence of rules, or a pattern is no regular expression.
    """
    if not isinstance(value, tuple | list):
        raise ValueError(f"{given}={value!r} must be a tuple of rules, as in {_EXAMPLE}")
    rules = []
    for number, item in enumerate(value, 1):
        pair = item if isinstance(item, tuple | list) else ()
        if len(pair) != 2 or type(pair[0]) is not str:
            raise ValueError(
                f"{given}: rule {number} is {item!r} and must be a pair of a pattern and "
                f"overrides; rules look like {_EXAMPLE}, with a comma behind a single one"
            )
        pattern, settings = pair
        if hasattr(settings, "to_dict"):
            settings = settings.to_dict()
        overrides = {"method": settings} if isinstance(settings, str) else settings
        if not isinstance(overrides, Mapping) or not overrides:
            raise ValueError(
                f"{given}: rule {number} ({pattern!r}) sets {settings!r}; name a method, "
                f"{method_names()}, or a dict of fields, such as {{'bits': 4.0}}"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{given}: the pattern {pattern!r} of rule {number} is no regular expression: "
                f"{error}; mend it"
            ) from None
        rules.append(Rule(pattern, tuple(overrides.items())))
    return tuple(rules)


def rule_of(rules: Iterable[Rule], name: str) -> Rule | None:
    """The first one whose pattern matches the whole name."""
    return next((rule for rule in rules if rule.matches(name)), None)


def numbered(
    given: str, rules: Sequence[Rule]
) -> Iterator[tuple[Rule, contextlib.AbstractContextManager[None]]]:
    """Each rule, with a context that names it in a ValueError."""
    for number, rule in enumerate(rules, 1):
        yield rule, _naming(_label(given, number, rule))


def check_all_used(
    given: str,
    rules: Sequence[Rule],
    names: Sequence[str],
    no_layers: Mapping[str, str],
) -> None:
    """Checks that every rule has a layer.

    Args:
      given: what the rules are, for messages.
      rules: in their order.
      names: of all layers.
      no_layers: {name that somebody may take for a layer's: why it is none, and what to do}.

    Raises:
      ValueError: a rule has none; the message says why.
    """
    first = {}  # {name: number of the rule that has it}
    for name in names:
        first[name] = next((i for i, rule in enumerate(rules, 1) if rule.matches(name)), None)
    for number, rule in enumerate(rules, 1):
        if number in first.values():
            continue
        here = f"{_label(given, number, rule)} has no layer"
        matched = next((name for name in names if rule.matches(name)), None)
        if matched is not None:
            raise ValueError(
                f"{here}: rule {first[matched]} takes {matched} first; move it up, or leave it out"
            )
        for name, why in no_layers.items():
            if rule.matches(name):
                raise ValueError(f"{here}: {why}")
        if not names:
            raise ValueError(f"{here}: the model has none; leave it out")
        parts = [name for name in names if re.search(rule.pattern, name)]
        near = parts or nearest_names(rule.pattern, names, _NAMED) or names
        more = f" and {len(near) - _NAMED} more" if len(near) > _NAMED else ""
        raise ValueError(
            f"{here}: a pattern is to match a whole name, such as "
            f"{', '.join(map(repr, near[:_NAMED]))}{more}; mend it, or leave it out"
        )


def fields_of(rule: Rule, method: Any) -> dict[str, Any]:
    """What a rule sets of its method's settings: {field: value of its type}.

    Args:
      rule: whose values are checked, not whether they fit one another.
      method: of METHODS, or DENSE or INT8, which have no fields.

    Raises:
      ValueError: there is no such method or field, or a value is of another type.
    """
    fields = {name: value for name, value in rule.overrides if name != "method"}
    if method not in (DENSE, INT8, *METHODS):
        raise ValueError(f"method={method!r} must be one of {method_names()}")
    if method in (DENSE, INT8):
        if fields:
            raise ValueError(f"{method!r} takes no {next(iter(fields))}; leave it out")
        return {}
    settings, section = METHODS[method].settings, METHODS[method].section
    types = typing.get_type_hints(settings)
    for name in fields:
        if name not in types:
            near = nearest_name(str(name), [*types, "method"])
            meant = f"; did you mean {near!r}?" if near else ""
            raise ValueError(
                f"{name!r} is neither 'method' nor a field of {section}.*, which has "
                f"{', '.join(types)}{meant}"
            )
    return {name: typed(name, types[name], value) for name, value in fields.items()}


def typed(name: str, kind: type, value: Any) -> Any:
    """A value of a field, of its type; an integer becomes a float where the field is one.

    Raises:
      ValueError: it is of another type, or not finite.
    """
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(
            f"{name}={value!r} must be of type {kind.__name__}, not {type(value).__name__}"
        )
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be finite")
    return value


def method_names() -> str:
    """What a rule may name as a method."""
    return ", ".join([DENSE, INT8, *METHODS])


def _label(given: str, number: int, rule: Rule) -> str:
    return f"{given}: rule {number} ({rule.pattern!r})"


@contextlib.contextmanager
def _naming(label: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
