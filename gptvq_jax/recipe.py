"""Which layer gets other settings: the rules of config.recipe, by names alone.

A rule is a pair (pattern, overrides), such as (".*/down_proj", {"bits": 4.0}). The first rule whose
pattern, a regular expression, matches the whole name of a layer is that layer's:

    layers_12/mlp/down_proj     a linear layer of a block that is quantized
    embed_tokens                the embedding, and the head where both are one matrix
    lm_head                     a head of its own

Overrides are a method, as text, or a dict of `method` and fields of that method's section of the
config, which keep their values there where they are not named. Beside the METHODS there are
'dense', as the run's dense_dtype has it, and 'int8', rows of 8 bits with one scale each.

rule_settings.py says what these make of a layer.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from gptvq_jax.console.nearest_name import nearest_name
from gptvq_jax.methods.registry import METHODS

DENSE, INT8 = "dense", "int8"
EMBEDDING, HEAD = "embed_tokens", "lm_head"
_EXAMPLE = "(('lm_head', 'int8'), ('.*/down_proj', {'bits': 4.0}))"


class Rule(NamedTuple):
    """Of a recipe."""

    pattern: str
    overrides: tuple[tuple[str, Any], ...]  # fields and values; hashable

    @property
    def plain(self) -> tuple[str, Any]:
        """As a config has it."""
        named = dict(self.overrides)
        return self.pattern, named["method"] if named.keys() == {"method"} else named


def parse(value: Any) -> tuple[Rule, ...]:
    """The rules of a config's `recipe`.

    Raises:
      ValueError: it is no sequence of rules, or a pattern is no regular expression.
    """
    if not isinstance(value, tuple | list):
        raise ValueError(f"config.recipe={value!r} must be a tuple of rules, as in {_EXAMPLE}")
    rules = []
    for number, item in enumerate(value, 1):
        pair = item if isinstance(item, tuple | list) else ()
        if isinstance(item, str) and item.lstrip().startswith(("(", "[")):
            raise ValueError(
                f"config.recipe={item} cannot be read: something in it is no literal (a number, a "
                f"text in quotes, True or False) or a bracket is open; it looks like {_EXAMPLE}"
            )
        if len(pair) != 2 or type(pair[0]) is not str:
            raise ValueError(
                f"config.recipe: rule {number} is {item!r} and must be a pair of a pattern and "
                f"overrides; a recipe looks like {_EXAMPLE}, with a comma behind a single rule"
            )
        pattern, given = pair
        if hasattr(given, "to_dict"):
            given = given.to_dict()
        overrides = {"method": given} if isinstance(given, str) else given
        if not isinstance(overrides, dict) or not overrides:
            raise ValueError(
                f"config.recipe: rule {number} ({pattern!r}) sets {given!r}; name a method, "
                f"{method_names()}, or a dict of fields, such as {{'bits': 4.0}}"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"config.recipe: the pattern {pattern!r} of rule {number} is no regular "
                f"expression: {error}; mend it"
            ) from None
        rules.append(Rule(pattern, tuple(overrides.items())))
    return tuple(rules)


def plain(rules: Sequence[Rule]) -> tuple[tuple[str, Any], ...]:
    """The value of a config's `recipe`: the inverse of `parse`."""
    return tuple(rule.plain for rule in rules)


def rule_text(rules: Sequence[Rule], rule: Rule) -> str:
    """A rule in one line, with its number: "2. .*/down_proj: bits=4.0"."""
    fields = [value if name == "method" else f"{name}={value}" for name, value in rule.overrides]
    return f"{rules.index(rule) + 1}. {rule.pattern}: {', '.join(map(str, fields))}"


def rule_of(rules: Iterable[Rule], name: str) -> Rule | None:
    """The first one whose pattern matches the whole name."""
    return next((rule for rule in rules if re.fullmatch(rule.pattern, name)), None)


def check_used(rules: Sequence[Rule], names: Sequence[str], routers: Sequence[str] = ()) -> None:
    """Checks that every rule has a layer.

    Args:
      rules: of the recipe.
      names: of all layers.
      routers: names of those of experts, which no rule can have.

    Raises:
      ValueError: one has none; the message says why.
    """
    used = {rule_of(rules, name) for name in names}
    for number, rule in enumerate(rules, 1):
        if rule in used:
            continue
        here = f"config.recipe: rule {number} ({rule.pattern!r}) has no layer"
        matched = next((name for name in names if re.fullmatch(rule.pattern, name)), None)
        if matched is not None:
            earlier = rules.index(rule_of(rules, matched)) + 1
            raise ValueError(f"{here}: rule {earlier} takes {matched} first; move it up")
        if re.fullmatch(rule.pattern, HEAD):
            raise ValueError(f"{here}: the head of this model is its embedding; name {EMBEDDING!r}")
        router = next((name for name in routers if re.fullmatch(rule.pattern, name)), None)
        if router is not None:
            raise ValueError(
                f"{here}: {router} is a router, and routers stay as they are; leave the rule out"
            )
        part = next((name for name in names if re.search(rule.pattern, name)), None)
        near = part or nearest_name(rule.pattern, names) or names[0]
        raise ValueError(
            f"{here}: a pattern is to match a whole name, such as {near!r}; mend it, or leave it "
            "out"
        )


def method_names() -> str:
    """What a rule may name as a method."""
    return ", ".join([DENSE, INT8, *METHODS])
