"""Figures of held-out text as a user reads them, and how they were measured."""

import json
from collections.abc import Mapping
from typing import Any

Figures = Mapping[str, Mapping[str, float | None]]  # {name: {"value", "standard_error"}}


def comparison_lines(comparison: Figures, model: str, reference: str) -> list[tuple[str, str]]:
    """(label, text) of each line about two models, but for their perplexities.

    Args:
      comparison: as run/compare.comparison returns it.
      model, reference: what they are called.
    """
    kl = {name: figure_text(comparison[f"kl_{name}"], ".4g") for name in _KL}
    return [
        (
            "KL divergence",
            ", ".join(f"{label} {kl[name]}" for name, label in _KL.items())
            + f" nats a token, KL({reference} || {model})",
        ),
        ("same top-1", figure_text(comparison["same_top1"], ".2f", 100) + " % of tokens"),
    ]


_KL = {"mean": "mean", "median": "median", "99": "99 %", "max": "maximum"}


def protocol_text(protocol: Mapping[str, Any]) -> str:
    """How the text was cut, in one line.

    Args:
      protocol: as run/text.protocol returns it.
    """
    joiner, windows = protocol["joiner"], protocol["windows"]
    joined = "one text" if joiner is None else f"joined by {json.dumps(joiner)}"
    errors = "standard errors over windows" if windows > 1 else "one window has no standard error"
    return (
        f"{protocol['dataset']}, {protocol['split']}, {joined}; {windows} windows x "
        f"{protocol['context']} tokens, {protocol['tokens']} predicted; BOS: {protocol['bos']}; "
        f"{errors}"
    )


def figure_text(figure: Mapping[str, float | None], form: str, factor: float = 1) -> str:
    """A value, and after a sign its standard error, in two digits, where there is one.

    Args:
      figure: "value" and "standard_error"; numbers, or strings that float() reads.
      form: format of the value.
      factor: of both.
    """
    text = f"{factor * float(figure['value']):{form}}"
    error = figure["standard_error"]
    return text if error is None else f"{text} ± {factor * float(error):.2g}"
