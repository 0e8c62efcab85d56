"""The rules of config.recipe: which layers of a run get other settings.

Names of layers are

    layers_12/mlp/down_proj     a linear layer of a block that is quantized
    embed_tokens                the embedding, and the head where both are one matrix
    lm_head                     a head of its own

Fields that a rule does not name have their values in the config; what is 'dense' is stored as the
run's dense_dtype. rule_settings.py says what rules make of a layer.
"""

from collections.abc import Sequence
from typing import Any

from gptvq_jax.rules import Rule, check_all_used, parse_rules

GIVEN = "config.recipe"
EMBEDDING, HEAD = "embed_tokens", "lm_head"


def parse(value: Any) -> tuple[Rule, ...]:
    """The rules of a config's `recipe`.

    Raises:
      ValueError: as `rules.parse_rules`.
    """
    for item in value if isinstance(value, tuple | list) else ():
        if isinstance(item, str) and item.lstrip().startswith(("(", "[")):  # of a command line
            raise ValueError(
                f"{GIVEN}={item} cannot be read: something in it is no literal (a number, a text "
                "in quotes, True or False) or a bracket is open; mend it"
            )
    return parse_rules(GIVEN, value)


def plain(rules: Sequence[Rule]) -> tuple[tuple[str, Any], ...]:
    """The value of a config's `recipe`: the inverse of `parse`."""
    named = [(rule.pattern, dict(rule.overrides)) for rule in rules]
    return tuple(
        (pattern, fields["method"] if fields.keys() == {"method"} else fields)
        for pattern, fields in named
    )


def rule_text(rules: Sequence[Rule], rule: Rule) -> str:
    """A rule in one line, with its number: "2. .*/down_proj: bits=4.0"."""
    fields = [value if name == "method" else f"{name}={value}" for name, value in rule.overrides]
    return f"{rules.index(rule) + 1}. {rule.pattern}: {', '.join(map(str, fields))}"


def check_used(rules: Sequence[Rule], names: Sequence[str], routers: Sequence[str] = ()) -> None:
    """Checks that every rule has a layer.

    Args:
      rules: of the recipe.
      names: of all layers.
      routers: names of those of experts, which no rule can have.

    Raises:
      ValueError: one has none; the message says why.
    """
    tied = f"the head of this model is its embedding; name {EMBEDDING!r}"
    why = "it is of a router, and routers stay as they are; leave the rule out"
    no_layers = dict.fromkeys(routers, why) | {HEAD: tied}
    check_all_used(GIVEN, rules, names, no_layers)
