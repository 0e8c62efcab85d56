"""Fields set on the command line, against those of the config file: each counts or is refused.

A config file sets many fields together. A field that somebody names on the command line may have no
effect under the others: the run would go on as if it had not been named. `ignored` lists such
fields with what to set instead; `settle` refuses them.

One conflict is settled instead, because only one reading makes sense: a budget of bits that stands
in the file gives way to a method, or to one format for all layers, that the command line names.
"""

import dataclasses
from collections import Counter
from collections.abc import Collection
from typing import Any

from ml_collections import config_dict

from gptvq_jax.config import CALIBRATION_TEXT, CalibrationSettings, RunSettings, from_config
from gptvq_jax.methods.gptvq_settings import MAX_CODE_BITS, GPTVQSettings, makes_codes
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.methods.trellis_settings import INT8
from gptvq_jax.rule_settings import is_open, methods_of, rule_settings

_SECTIONS = {
    "vq": "--config.method=gptvq",
    "aqlm": "--config.method=aqlm",
    "trellis": "--config.method=trellis",
    "uniform": "--config.method=gptq or rtn",
}
_WITHOUT_BUDGET = "--config.allocation.bits_per_value=0"


def settle(
    config: config_dict.ConfigDict, given: Collection[str]
) -> tuple[config_dict.ConfigDict, str]:
    """Settles what the command line names against the rest of a config.

    Args:
      config: with the values of the command line in it.
      given: the fields named there, such as "vq.dim".

    Returns:
      The config that is meant, and a line for the user on what changed in it, or "".

    Raises:
      ValueError: as `from_config`; or a field that was named has no effect.
    """
    config, note = settle_budget(config, given)
    settings = from_config(config)
    reasons = ignored(settings)
    for field in given:
        if field in reasons:
            raise ValueError(f"--config.{field} has no effect {reasons[field]}")
    check_rules(settings)
    return config, note


def check_rules(settings: RunSettings) -> None:
    """Checks that all that rules of the recipe name counts.

    Raises:
      ValueError: a field has no effect beside the others of its rule.
    """
    for number, rule in enumerate(settings.recipe, 1):
        overrides = dict(rule.overrides)
        method = overrides.pop("method", settings.method)
        if not overrides:
            continue
        section, allocation = METHODS[method].section, settings.allocation
        if not is_open(settings, rule):
            allocation = dataclasses.replace(allocation, bits_per_value=0.0)
        as_run = dataclasses.replace(
            settings,
            recipe=(),
            method=method,
            allocation=allocation,
            **{"vq": GPTVQSettings(), section: rule_settings(settings, rule)},
        )
        reasons = ignored(as_run)
        for field in overrides:
            reason = reasons.get(f"{section}.{field}")
            if reason and not (field in ("dim", "bits") and is_open(settings, rule)):
                raise ValueError(
                    f"config.recipe: {field} of rule {number} ({rule.pattern!r}) has no effect "
                    f"{reason}"
                )


def settle_budget(
    config: config_dict.ConfigDict, given: Collection[str]
) -> tuple[config_dict.ConfigDict, str]:
    """`settle` of a budget alone: it gives way to one format for all layers that is named."""
    note = ""
    contradicting = _against_budget(config, given)
    if contradicting:
        named = " and ".join(f"--config.{field}" for field in contradicting)
        note = (
            f"allocation.bits_per_value={config.allocation.bits_per_value:g} of the config file is "
            f"off, because all layers get what {named} says"
        )
        config = config.copy_and_resolve_references()
        config.allocation.bits_per_value = 0.0
    return config, note


def _against_budget(config: config_dict.ConfigDict, given: Collection[str]) -> list[str]:
    """Fields named that a budget of the file rules out, if nothing of the budget was named."""
    known = isinstance(config, config_dict.ConfigDict) and {"allocation", "vq"} <= {*config}
    if not known or any(field.startswith("allocation.") for field in given):
        return []
    a, vq = config.allocation, config.vq
    if not a.bits_per_value:
        return []
    against = {
        "method": config.method in METHODS and not METHODS[config.method].allocation,
        "trellis.bits": config.method == "trellis",
        "vq.dim": set(a.dims) != {vq.dim},
        "vq.bits": set(a.bits) != {vq.bits},
        "vq.group_size": vq.group_size != 0,
    }
    return [field for field in given if against.get(field)]


def ignored(settings: RunSettings) -> dict[str, str]:
    """{field: why it has no effect under the other settings, and what to set instead}."""
    reasons: dict[str, str] = {}

    def when(condition: bool, fields: str, reason: str) -> None:
        for field in fields.split() if condition else ():
            reasons.setdefault(field, reason)

    section = METHODS[settings.method].section
    used = {METHODS[method].section for method in methods_of(settings)}
    for other, instead in _SECTIONS.items():
        when(
            other not in used,
            " ".join(f"{other}.{field}" for field in _fields(getattr(settings, other))),
            f"with method {settings.method!r}, which takes {section}.*; set {instead}",
        )
    _vq(settings, when)
    _aqlm(settings, when)
    _trellis(settings, when)
    _allocation(settings, when)
    _tune(settings, when)
    _finetune(settings, when)
    _method(settings, when)
    when(
        settings.calibration.asymmetry == 0,
        "solve_products",
        "without an asymmetric target; set --config.calibration.asymmetry above 0",
    )
    _calibration(settings.calibration, when)
    when(
        settings.calibration.gradient_groups == 0,
        "calibration.gradient_power",
        "where tokens are not weighted by gradients; set --config.calibration.gradient_groups=1",
    )
    return reasons


def _vq(settings: RunSettings, when) -> None:
    vq, budget = settings.vq, settings.allocation.bits_per_value > 0
    dims = set(settings.allocation.dims) if budget else {vq.dim}
    when(
        vq.group_size > 0,
        "vq.codebook_overhead",
        f"with vq.group_size={vq.group_size}; set --config.vq.group_size=0",
    )
    when(
        dims == {1}, "vq.exact_metric", "on single weights, whose metric is a number; set vq.dim=2"
    )
    when(
        vq.codebook_update == "none",
        "vq.update_iterations vq.learning_rate",
        "with vq.codebook_update='none'; set --config.vq.codebook_update=least_squares or adam",
    )
    when(
        vq.codebook_update == "least_squares" and not vq.svd_rank,
        "vq.learning_rate",
        "on conjugate gradients; set --config.vq.codebook_update=adam",
    )
    rounds = f"with vq.polish_rounds={vq.polish_rounds}; set --config.vq.polish_rounds="
    when(vq.polish_rounds == 0, "vq.beam vq.polish_judge", rounds + "1 or more")
    when(vq.polish_rounds <= 1, "vq.polish_tolerance", rounds + "2 or more")


def _aqlm(settings: RunSettings, when) -> None:
    aqlm = settings.aqlm
    rounds = f"with aqlm.rounds={aqlm.rounds}; set --config.aqlm.rounds="
    when(aqlm.rounds == 0, "aqlm.beam", rounds + "1 or more")
    when(aqlm.rounds <= 1, "aqlm.tolerance", rounds + "2 or more")
    when(
        aqlm.rounds == 0 and aqlm.start == "residual",
        "aqlm.block_size",
        rounds + "1 or more, or --config.aqlm.start=product",
    )
    when(
        aqlm.codebook_update != "adam",
        "aqlm.learning_rate",
        "on conjugate gradients; set --config.aqlm.codebook_update=adam",
    )


def _trellis(settings: RunSettings, when) -> None:
    trellis = settings.trellis
    of_codes = [f for f in _fields(trellis) if f not in ("form", "block_size")]
    when(
        settings.method == "trellis" and trellis.form == INT8,
        " ".join(f"trellis.{field}" for field in of_codes),
        f"with trellis.form={INT8}, which codes no layer; set --config.trellis.form=auto",
    )


def _allocation(settings: RunSettings, when) -> None:
    a, vq = settings.allocation, settings.vq
    of_candidates = "dims bits em_iterations measured"
    when(
        METHODS[settings.method].allocation == "columns",
        " ".join(f"allocation.{field}" for field in of_candidates.split()),
        f"with method {settings.method!r}, which measures no candidates; set --config.method=gptvq",
    )
    when(
        a.bits_per_value > 0 and METHODS[settings.method].allocation == "columns",
        "trellis.bits",
        f"under allocation.bits_per_value={a.bits_per_value:g}, which gives every layer its own; "
        f"set {_WITHOUT_BUDGET} for the same bits in all layers",
    )
    when(
        a.bits_per_value == 0,
        " ".join(f"allocation.{field}" for field in _fields(a) if field != "bits_per_value"),
        "without a budget; set --config.allocation.bits_per_value to the bits to spend",
    )
    of_dims = Counter(dim for dim in a.dims for bits in a.bits if makes_codes(dim, bits))
    most = max(of_dims.values(), default=0)
    when(
        most <= 2,
        "allocation.measured",
        f"on {most} candidates of a dimension, which are measured in any case; set more of "
        "--config.allocation.bits",
    )
    when(
        vq.svd_rank > 0 or vq.scale_block_size > 0,
        "allocation.sample",
        "with vq.svd_rank or vq.scale_block_size, which all rows of a layer share; set both to 0",
    )
    unused = {
        "bits": [bits for bits in a.bits if not any(makes_codes(dim, bits) for dim in a.dims)],
        "dims": [dim for dim in a.dims if not any(makes_codes(dim, bits) for bits in a.bits)],
    }
    for field, values in unused.items():
        other = "dims" if field == "bits" else "bits"
        when(
            a.bits_per_value > 0 and bool(values),
            f"allocation.{field}",
            f"in {', '.join(f'{v:g}' for v in values)}, which with no value of allocation.{other} "
            f"makes codes of 1 to {MAX_CODE_BITS} whole bits (dim * bits); leave it out, or set "
            f"--config.allocation.{other}",
        )
    for field, candidates in (("dim", a.dims), ("bits", a.bits)):
        value = getattr(vq, field)
        listed = f"allocation.{field.removesuffix('s')}s"
        when(
            a.bits_per_value > 0
            and METHODS[settings.method].allocation == "candidates"
            and set(candidates) != {value},
            f"vq.{field}",
            f"under allocation.bits_per_value={a.bits_per_value:g}, which chooses from {listed}; "
            f"set --config.{listed}={value}, or {_WITHOUT_BUDGET} for one format in all layers",
        )


def _tune(settings: RunSettings, when) -> None:
    t = settings.tune
    others = [field for field in _fields(t) if field not in ("block", "model")]
    when(
        not t.block,
        " ".join(f"tune.{field}" for field in others),
        "where blocks are not tuned; set --config.tune.block=True",
    )
    when(t.epochs == 1, "tune.patience", "on a single epoch; set --config.tune.epochs=2 or more")
    when(
        t.patience >= t.epochs,
        "tune.tolerance",
        f"with tune.patience={t.patience}, which {t.epochs} epochs do not exhaust; set "
        "--config.tune.epochs above it",
    )


def _finetune(settings: RunSettings, when) -> None:
    f = settings.finetune
    when(
        not settings.tune.model,
        " ".join(f"finetune.{field}" for field in _fields(f)),
        "where the model is not tuned as a whole; set --config.tune.model=True",
    )
    when(
        not f.codes,
        " ".join(f"finetune.{field}" for field in _fields(f) if field.startswith("codes_")),
        "where codes stay as they are; set --config.finetune.codes=True",
    )
    looks = -(-f.steps // f.evaluate_every)
    when(
        f.patience >= looks,
        "finetune.patience finetune.tolerance",
        f"with finetune.patience={f.patience}, which {looks} looks at the windows held out do not "
        "exhaust; lower finetune.patience or finetune.evaluate_every",
    )


def _calibration(c: CalibrationSettings, when) -> None:
    when(
        bool(c.statistics),
        " ".join(
            f"calibration.{field}" for field in (*CALIBRATION_TEXT, "products", "model_products")
        ),
        "with calibration.statistics, whose text is that of the file; set it in "
        "scripts/calibrate.py",
    )
    when(
        len(c.datasets) == 1,
        "calibration.dataset_weights",
        "on a single text; set --config.calibration.datasets to several",
    )


def _method(settings: RunSettings, when) -> None:
    """Of what all methods are given, what this one does not use."""
    drawn = ("kmeans++", "random")
    section = METHODS[settings.method].section
    used = [settings.method_settings, *(rule_settings(settings, r) for r in settings.recipe)]
    instead = "--config.tune.block=True, which shuffles windows"
    if hasattr(settings.method_settings, "seed"):
        instead = f"--config.{section}.seed={' or '.join(drawn)}, or {instead}"
    when(
        not any(getattr(of, "seed", None) in drawn for of in used) and not settings.tune.block,
        "seed",
        f"where nothing is drawn at random; set {instead}",
    )
    when(
        methods_of(settings) == ["rtn"] and settings.calibration.asymmetry == 0,
        "damping",
        "with method 'rtn' and a symmetric target, which invert no Hessian; set "
        "--config.method=gptq, or calibration.asymmetry above 0",
    )


def _fields(section: Any) -> list[str]:
    return list(section.__dataclass_fields__)
