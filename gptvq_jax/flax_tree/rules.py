"""Rules: which layer of a tree is quantized, and how; in their order, the first that fits."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gptvq_jax.config import checked_field
from gptvq_jax.console.nearest_name import nearest_name
from gptvq_jax.methods.registry import METHODS, Method

DENSE = "dense"
_NAMED = {"int8": {"method": "rtn", "bits": 8, "group_size": 0, "symmetric": True}}


class Rule(NamedTuple):
    """A pattern for whole names of layers, and what becomes of these."""

    pattern: str
    method: Method | None  # None: the layer stays dense
    settings: Any  # of the method

    def fits(self, name: str) -> bool:
        return re.fullmatch(self.pattern, name) is not None


def parse_rules(rules: Any) -> list[Rule]:
    """Checks rules.

    Args:
      rules: pairs of a regular expression and {"method": a key of METHODS, by default "gptvq", and
        fields of that method's settings}; or as text the method alone, "dense", or "int8" for rows
        of 8 bits.

    Raises:
      ValueError: one is no such pair; the message says which, and what it may be.
    """
    if not isinstance(rules, Sequence) or isinstance(rules, str) or not rules:
        raise ValueError(f"rules must be a list of rules, {_EXAMPLE}; not {rules!r}")
    return [_parse(number, rule) for number, rule in enumerate(rules)]


def assign(
    rules: Sequence[Rule], layers: Iterable[str], passed_over: Mapping[str, str]
) -> dict[str, Rule]:
    """The rule of every layer that one fits.

    Args:
      rules: in their order.
      layers: names.
      passed_over: {name of a parameter that is no layer: why}; a rule may say that it stays dense.

    Raises:
      ValueError: a rule has no layer.
    """
    layers = list(layers)
    taken = {name: first_rule(rules, name) for name in layers}
    kept = {rule for name in passed_over if (rule := first_rule(rules, name)) and not rule.method}
    for number, rule in enumerate(rules):
        if rule in kept or any(of_layer is rule for of_layer in taken.values()):
            continue
        what = f"rules[{number}], {rule.pattern!r}, is not used:"
        if earlier := [name for name in layers if rule.fits(name)]:
            raise ValueError(
                f"{what} {taken[earlier[0]].pattern!r} before it takes {_some(earlier)}; put it "
                "first or leave it out"
            )
        if other := [name for name in passed_over if rule.fits(name)]:
            raise ValueError(
                f"{what} {other[0]} is no layer, as {passed_over[other[0]]}; leave the rule out"
            )
        raise ValueError(f"{what} the whole name of no layer fits it; layers are {_some(layers)}")
    return {name: rule for name, rule in taken.items() if rule is not None}


def first_rule(rules: Sequence[Rule], name: str) -> Rule | None:
    """The one that counts for a name."""
    return next((rule for rule in rules if rule.fits(name)), None)


def _parse(number: int, rule: Any) -> Rule:
    if not isinstance(rule, Sequence) or isinstance(rule, str) or len(rule) != 2:
        raise ValueError(f"rules[{number}]={rule!r} must be a pair, {_EXAMPLE}")
    pattern, settings = rule
    where = f"rules[{number}], {pattern!r}:"
    if not isinstance(pattern, str):
        raise ValueError(f"{where} a regular expression is a text (str)")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where} no regular expression, {error}; escape it or mend it") from None
    if settings == DENSE:
        return Rule(pattern, None, None)
    if isinstance(settings, str):
        settings = _NAMED.get(settings, {"method": settings})
    if not isinstance(settings, Mapping):
        raise ValueError(f"{where} settings are a dict, a method or {DENSE!r}, not {settings!r}")
    fields = dict(settings)
    name = fields.pop("method", "gptvq")
    if name not in METHODS:
        known = ", ".join([*METHODS, DENSE, *_NAMED])
        raise ValueError(f"{where} method={name!r} must be one of {known}")
    method = METHODS[name]
    return Rule(pattern, method, _settings(where, method, fields))


def _settings(where: str, method: Method, fields: Mapping[str, Any]) -> Any:
    known = [name for name in method.settings.__dataclass_fields__]
    for name in fields:
        if name not in known:
            meant = nearest_name(str(name), known)
            hint = f"did you mean {meant!r}?" if meant else f"there are {', '.join(known)}"
            raise ValueError(f"{where} no setting {name!r} of {method.section}; {hint}")
    try:
        checked = {n: checked_field(f"{method.section}.{n}", value) for n, value in fields.items()}
        return method.settings(**checked)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None


def _some(names: Collection[str], most: int = 6) -> str:
    names = list(names)
    left = len(names) - most
    return ", ".join(names[:most]) + (f" and {left} more" if left > 0 else "") or "none"


_EXAMPLE = "as in [('.*/head', 'dense'), ('.*', {'dim': 2, 'bits': 3})]"
