"""Rules for the layers of a tree, whose names are paths of parameters; in rules.py how they read.

Fields that a rule does not name have the defaults of its method.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gptvq_jax.methods.registry import METHODS
from gptvq_jax.rule_settings import Format
from gptvq_jax.rules import (
    DENSE,
    INT8,
    INT8_ROWS,
    Rule,
    check_all_used,
    fields_of,
    numbered,
    parse_rules,
    rule_of,
)

_GIVEN = "rules"
_METHOD = "gptvq"  # of a rule that names none


def parse(value: Any) -> tuple[Rule, ...]:
    """The rules of a tree.

    Raises:
      ValueError: there is none, or one cannot be; the message says which, and why.
    """
    rules = parse_rules(_GIVEN, value)
    if not rules:
        raise ValueError(f"{_GIVEN} is empty; name a layer at least, such as ('.*', {INT8!r})")
    for rule, context in numbered(_GIVEN, rules):
        with context:
            _format(rule)
    return rules


def format_of(rules: Sequence[Rule], name: str) -> Format | None:
    """What the rules make of a layer; None if they have none for it."""
    rule = rule_of(rules, name)
    return None if rule is None else _format(rule)


def assign(
    rules: Sequence[Rule], layers: Sequence[str], passed_over: Mapping[str, str]
) -> dict[str, Format]:
    """What becomes of every layer that has a rule.

    Args:
      rules: in their order.
      layers: names.
      passed_over: {name of a parameter that is no layer: why}; a rule may say that it stays dense.

    Raises:
      ValueError: a rule has no layer.
    """
    others = {name: format_of(rules, name) for name in passed_over}
    kept = [name for name, found in others.items() if found and found.method == DENSE]
    no_layers = {
        name: f"{name} is no layer, as {why}; leave the rule out"
        for name, why in passed_over.items()
        if name not in kept
    }
    check_all_used(_GIVEN, rules, [*layers, *kept], no_layers)
    return {name: found for name in layers if (found := format_of(rules, name))}


def _format(rule: Rule) -> Format:
    method = rule.method(_METHOD)
    fields = fields_of(rule, method)
    if method == DENSE:
        return Format(DENSE, None, rule)
    if method == INT8:  # nearest, so that its error is that of the grid
        return Format("rtn", INT8_ROWS, rule)
    return Format(method, METHODS[method].settings(**fields), rule)
