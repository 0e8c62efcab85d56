"""What rules of a recipe make of layers: method and settings, and what a budget may choose.

Under a budget for all layers a rule leaves open what it does not name. A layer whose rule names no
other method chooses from the candidates that agree with the rule, or gets the bits of its columns,
unless the rule says all its bits. The budget is of the linear layers of all blocks, also of those
whose bits rules say; not of the embedding and the head.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from gptvq_jax.methods.registry import METHODS
from gptvq_jax.recipe import EMBEDDING, GIVEN, HEAD
from gptvq_jax.rules import DENSE, INT8, INT8_ROWS, Rule, fields_of, numbered, rule_of


class Format(NamedTuple):
    """How a layer is quantized."""

    method: str  # of METHODS, or DENSE or INT8
    settings: Any  # of the method; None of DENSE
    rule: Rule | None = None  # whose layer it is

    @property
    def coder(self) -> str:
        """The one of METHODS that makes its codes; "" of DENSE."""
        return {DENSE: "", INT8: "gptq"}.get(self.method, self.method)


def format_of(settings: Any, name: str) -> Format:
    """How a layer is quantized, but for what a budget for all layers chooses.

    Args:
      settings: of the run (config.RunSettings).
      name: of the layer.
    """
    rule = rule_of(settings.recipe, name)
    if rule is None:
        return Format(settings.method, settings.method_settings)
    in_budget = name not in (EMBEDDING, HEAD)
    return Format(_method(settings, rule), rule_settings(settings, rule, in_budget), rule)


def rule_settings(settings: Any, rule: Rule, in_budget: bool = True) -> Any:
    """Settings of the method of a rule's layers; None of DENSE.

    Args:
      settings: of the run.
      rule: of its recipe.
      in_budget: whether the layers are among those that a budget is of, which the embedding and
        the head are not.

    Raises:
      ValueError: an override is unknown, of another type, or cannot be.
    """
    method = _method(settings, rule)
    if method in (DENSE, INT8):
        return None if method == DENSE else INT8_ROWS
    if in_budget and _shares_candidates(settings, rule):
        return choices(settings, rule)[0]  # the only one, or the budget says which
    base = getattr(settings, METHODS[method].section)
    return dataclasses.replace(base, **fields_of(rule, method))


def is_open(settings: Any, rule: Rule | None) -> bool:
    """Whether a budget for all layers has a say in the bits of a rule's layers."""
    if not settings.allocation.bits_per_value:
        return False
    if rule is None:
        return True
    if _method(settings, rule) != settings.method:
        return False
    if _shares_candidates(settings, rule):
        return len(choices(settings, rule)) > 1
    return "bits" not in dict(rule.overrides)


def choices(settings: Any, rule: Rule | None) -> list[Any]:
    """The candidates of a layer under a budget, with the rule's overrides in each of them.

    Those that are equal then are one, and those that cannot be are left out.

    Args:
      settings: of the run, whose method has candidates.
      rule: of the layer, if any, which names no other method.
    """
    if rule is None:
        return settings.candidates
    found, fields = [], fields_of(rule, settings.method)
    for candidate in settings.candidates:
        try:
            own = dataclasses.replace(candidate, **fields)
        except ValueError:
            continue
        if own not in found:
            found.append(own)
    return found


def check_rules(settings: Any) -> None:
    """Checks what can be checked without a model.

    Raises:
      ValueError: of a rule, an override that is unknown, of another type or that cannot be.
    """
    for rule, context in numbered(GIVEN, settings.recipe):
        with context:
            _check_rule(settings, rule)


def methods_of(settings: Any) -> list[str]:
    """Of METHODS, the run's own and those that rules name."""
    named = [settings.method, *(_method(settings, rule) for rule in settings.recipe)]
    return [name for name in dict.fromkeys(named) if name in METHODS]


def _method(settings: Any, rule: Rule) -> str:
    return rule.method(settings.method)


def _shares_candidates(settings: Any, rule: Rule) -> bool:
    """Whether a rule's layers choose from the candidates of a budget."""
    allocated = settings.allocation.bits_per_value and METHODS[settings.method].allocation
    return allocated == "candidates" and _method(settings, rule) == settings.method


def _check_rule(settings: Any, rule: Rule) -> None:
    method = _method(settings, rule)
    fields = fields_of(rule, method)
    if method in (DENSE, INT8):
        return
    if settings.allocation.bits_per_value and method == settings.method:
        _check_under_budget(settings, rule, fields)
    rule_settings(settings, rule)


def _check_under_budget(settings: Any, rule: Rule, fields: Mapping[str, Any]) -> None:
    """Of a rule whose layers a budget may choose bits for."""
    if METHODS[settings.method].allocation == "columns":
        if "window_bits" in fields and "bits" not in fields:
            raise ValueError(
                "window_bits is the same for all layers that share a budget; name bits too"
            )
        return
    if not choices(settings, rule):
        base = dataclasses.replace(settings.vq, **fields)  # says what is wrong, if it is wrong
        raise ValueError(
            f"no pair of allocation.dims and allocation.bits makes codes with it; name dim and "
            f"bits, such as dim={base.dim}, bits={base.bits:g}"
        )
    if fields.get("group_size") and len(choices(settings, rule)) > 1:
        raise ValueError("group_size must be 0 where a budget chooses bits; name dim and bits too")
