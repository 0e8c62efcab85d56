"""What the command line names counts, or is refused with what to set instead."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.config import default_config, from_config
from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.methods.gptvq import Counts
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.moves.sweep import diagonal_only, whitening
from gptvq_jax.run.overrides import ignored, settle

BUDGET = {"allocation.bits_per_value": 3.0}
TWO_CANDIDATES = {**BUDGET, "allocation.bits": (2.0, 3.0)}
# Two allowed values of every field, of which one is not what a scenario has.
VALUES = {
    "vq": {
        "dim": (1, 2), "bits": (2.0, 1.0), "group_size": (2048, 0),
        "codebook_overhead": (0.01, 0.02), "max_group_cols": (8, 4), "em_iterations": (3, 2),
        "seed": ("random", "kmeans++"), "exact_metric": (False, True), "block_size": (4, 2),
        "scale_block_size": (8, 0), "codebook_update": ("none", "adam"),
        "update_iterations": (3, 2), "learning_rate": (0.5, 0.25), "polish_rounds": (3, 2),
        "polish_tolerance": (0.25, 0.5), "polish_judge": ("held_out", "fitted"),
        "codebook_bits": (16, 8), "svd_rank": (2, 0),
        "row_scales": (True, False), "beam": (2, 1),
    },
    "aqlm": {
        "num_codebooks": (4, 2), "code_bits": (3, 2), "dim": (4, 8),
        "start": ("residual", "product"), "seed": ("random", "kmeans++"), "em_iterations": (3, 2),
        "beam": (2, 1), "rounds": (3, 2), "tolerance": (0.25, 0.5),
        "codebook_update": ("adam", "least_squares"), "update_iterations": (3, 2),
        "learning_rate": (0.5, 0.25), "block_size": (4, 2),
    },
    "uniform": {
        "bits": (2, 1), "group_size": (8, 4), "symmetric": (True, False), "block_size": (4, 2)
    },
}  # fmt: skip
SCENARIOS = {
    "gptvq": {},
    "gptvq of single weights": {"vq.dim": 1, "vq.svd_rank": 1},
    "gptvq as in the paper": {"vq.codebook_update": "adam", "vq.polish_rounds": 0},
    "gptvq with codebooks as they come": {"vq.codebook_update": "none", "vq.group_size": 32},
    "aqlm": {"method": "aqlm"},
    "aqlm from its start alone": {"method": "aqlm", "aqlm.rounds": 0, "aqlm.start": "residual"},
    "aqlm by Adam": {"method": "aqlm", "aqlm.codebook_update": "adam", "aqlm.seed": "mahalanobis"},
    "gptq": {"method": "gptq"},
    "rtn": {"method": "rtn"},
}
# Refused although the program names them: it does not come to them, or they give the same there.
WITHOUT_EFFECT = {
    "gptvq of single weights": {"vq.exact_metric"},  # test_the_metric_of_single_weights
    "gptvq as in the paper": {"vq.beam", "vq.polish_judge"},  # 0 rounds
    "aqlm from its start alone": {"aqlm.beam", "aqlm.tolerance", "aqlm.block_size"},  # 0 rounds
}
TRACED_IN_SECONDS = ("gptq", "rtn")


def config_with(fields):
    config = default_config()
    config.vq.bits, config.aqlm.code_bits = 1.0, 2  # small programs
    config.update_from_flattened_dict(fields)
    return config


def settings_with(fields):
    return from_config(config_with(fields))


def program(settings):
    """What a layer is quantized by, as text; and whether its random key is used."""
    rows, cols = 64, 64
    square = jax.ShapeDtypeStruct((cols, cols), jnp.float32)
    weight = jax.ShapeDtypeStruct((rows, cols), jnp.float32)
    method = METHODS[settings.method].quantize
    of_method = settings.method_settings
    more = {"judge": square} if getattr(of_method, "judged", False) else {}
    traced = partial(getattr(method, "__wrapped__", method), settings=of_method, **more)
    closed = jax.make_jaxpr(traced)(weight, square, square, jax.random.key(0))
    return str(closed)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in TRACED_IN_SECONDS else pytest.mark.slow)
        for name in SCENARIOS
    ],
)
def test_a_field_is_ignored_where_it_does_not_change_the_program(name):
    settings = settings_with(SCENARIOS[name])
    section = METHODS[settings.method].section
    of_method, refused = settings.method_settings, ignored(settings)
    assert set(VALUES[section]) == {field.name for field in dataclasses.fields(of_method)}
    unchanged = set()
    base = program(settings)
    for field, values in VALUES[section].items():
        value = next(value for value in values if value != getattr(of_method, field))
        try:
            other = dataclasses.replace(of_method, **{field: value})
        except ValueError:
            continue  # the other fields rule it out, which is said
        if program(dataclasses.replace(settings, **{section: other})) == base:
            unchanged.add(f"{section}.{field}")
    unchanged |= WITHOUT_EFFECT.get(name, set())
    # Counts are arguments of the program, whether it reads them or not.
    counts = {f"vq.{name}" for name in Counts._fields}
    of_section = {field for field in refused if field.startswith(f"{section}.")}
    assert unchanged - counts == of_section - counts


@pytest.mark.slow
def test_the_metric_of_single_weights_is_its_diagonal():
    hinv_chol = jnp.triu(jax.random.uniform(jax.random.key(0), (4, 4)) + 1)
    whiten = whitening(hinv_chol, GroupGrid(4, 4, 1, 4, 4))
    np.testing.assert_allclose(diagonal_only(whiten, hinv_chol), whiten, rtol=1e-6)


@pytest.mark.parametrize(
    "base, field, instead",
    [
        ({}, "uniform.bits", "--config.method=gptq or rtn"),
        ({}, "aqlm.beam", "--config.method=aqlm"),
        ({"method": "gptq"}, "vq.polish_rounds", "--config.method=gptvq"),
        ({"method": "aqlm"}, "vq.dim", "--config.method=gptvq"),
        ({"vq.group_size": 512}, "vq.codebook_overhead", "--config.vq.group_size=0"),
        ({}, "vq.learning_rate", "--config.vq.codebook_update=adam"),
        ({"vq.codebook_update": "none"}, "vq.update_iterations", "=least_squares or adam"),
        ({"vq.polish_rounds": 0}, "vq.beam", "--config.vq.polish_rounds=1 or more"),
        ({"vq.polish_rounds": 1}, "vq.polish_tolerance", "--config.vq.polish_rounds=2 or more"),
        ({"vq.dim": 1}, "vq.exact_metric", "vq.dim=2"),
        ({"method": "aqlm"}, "aqlm.learning_rate", "--config.aqlm.codebook_update=adam"),
        ({"method": "aqlm", "aqlm.rounds": 1}, "aqlm.tolerance", "--config.aqlm.rounds=2 or more"),
        ({}, "allocation.dims", "--config.allocation.bits_per_value"),
        ({}, "allocation.em_iterations", "--config.allocation.bits_per_value"),
        ({}, "allocation.measured", "--config.allocation.bits_per_value"),
        ({}, "allocation.sample", "--config.allocation.bits_per_value"),
        (TWO_CANDIDATES, "allocation.measured", "set more of --config.allocation.bits"),
        ({**BUDGET, "vq.scale_block_size": 32}, "allocation.sample", "set both to 0"),
        ({}, "calibration.gradient_power", "--config.calibration.gradient_groups=1"),
        (BUDGET, "calibration.gradient_power", "--config.calibration.gradient_groups=1"),
        ({}, "tune.epochs", "--config.tune.block=True"),
        ({"tune.block": True, "tune.epochs": 1}, "tune.patience", "--config.tune.epochs=2"),
        ({"tune.block": True, "tune.patience": 8}, "tune.tolerance", "--config.tune.epochs above"),
        ({}, "finetune.epochs", "--config.tune.model=True"),
        ({"tune.model": True}, "finetune.codes_share", "--config.finetune.codes=True"),
        ({"tune.model": True, "finetune.patience": 9}, "finetune.tolerance", "lower finetune.pa"),
        ({"method": "gptq"}, "seed", "--config.tune.block=True"),
        ({"method": "trellis"}, "seed", "--config.tune.block=True"),
        ({}, "trellis.bits", "--config.method=trellis"),
        ({"method": "trellis"}, "vq.dim", "--config.method=gptvq"),
        (
            {"method": "trellis", "trellis.form": "int8"},
            "trellis.window_bits",
            "--config.trellis.form=auto",
        ),
        ({"method": "trellis", **BUDGET}, "allocation.dims", "--config.method=gptvq"),
        ({"method": "trellis"}, "allocation.sample", "--config.allocation.bits_per_value"),
        ({"vq.seed": "mahalanobis"}, "seed", "--config.vq.seed=kmeans++ or random, or "),
        ({"method": "rtn", "calibration.asymmetry": 0.0}, "damping", "--config.method=gptq"),
    ],
)
def test_a_field_without_effect_is_refused_with_what_to_set(base, field, instead):
    config = config_with(base)
    with pytest.raises(
        ValueError, match=rf"^--config\.{field} has no effect .*{re.escape(instead)}"
    ):
        settle(config, [field])
    assert settle(config, []) == (config, "")  # a config file may well set it


@pytest.mark.parametrize(
    "base, field",
    [
        (BUDGET, "allocation.dims"),
        (BUDGET, "allocation.em_iterations"),
        (BUDGET, "allocation.sample"),
        ({"method": "trellis", **BUDGET}, "allocation.sample"),
        ({"method": "trellis"}, "trellis.bits"),
        ({"method": "trellis", **BUDGET}, "trellis.window_bits"),
        ({**BUDGET, "allocation.measured": 0}, "allocation.measured"),
        ({"calibration.gradient_groups": 1}, "calibration.gradient_power"),
        ({"tune.block": True}, "tune.tolerance"),
        ({"tune.block": True, "method": "rtn"}, "seed"),
        ({"method": "rtn"}, "damping"),  # of the asymmetric target
        ({"vq.seed": "random"}, "seed"),
        ({"vq.polish_rounds": 1}, "vq.beam"),
        (BUDGET, "vq.row_scales"),
        ({"vq.dim": 1, "vq.svd_rank": 2}, "vq.learning_rate"),
        ({"method": "aqlm", "aqlm.rounds": 0}, "aqlm.block_size"),  # of the product start
    ],
)
def test_a_field_with_an_effect_is_taken(base, field):
    assert settle(config_with(base), [field])[1] == ""


def test_fields_of_the_run_itself_always_count():
    """What is left when each section is switched on: nothing but the other methods' fields."""
    everything = config_with({"tune.block": True, "calibration.gradient_groups": 1, **BUDGET})
    everything.tune.model = everything.finetune.codes = True
    everything.vq.codebook_update = "adam"
    everything.vq.dim, everything.vq.bits = 2, 2.0
    everything.calibration.datasets = ("c4", "ptb")
    everything.allocation.dims, everything.allocation.bits = (2,), (2.0,)
    # So that vq.dim and vq.bits count there is one candidate, which is measured.
    left = {field for field in ignored(from_config(everything))} - {"allocation.measured"}
    assert {field.partition(".")[0] for field in left} == {"aqlm", "trellis", "uniform"}


# --- a budget in the file ---

IN_COMPANY = ("vq.svd_rank", "uniform.bits")

FILE = {"allocation.bits_per_value": 3.0, "allocation.bits": (2.0, 3.0, 4.0)}


@pytest.mark.parametrize(
    "given",
    [
        {"vq.dim": 4, "vq.bits": 2.0},
        {"vq.bits": 2.0},
        {"vq.dim": 1, "vq.svd_rank": 4},
        {"vq.group_size": 4096},
        {"method": "gptq"},
        {"method": "rtn", "uniform.bits": 2},
        {"method": "trellis", "trellis.bits": 2.5},
        {"method": "aqlm"},
    ],
)
def test_one_format_for_all_layers_switches_the_budget_of_the_file_off(given):
    config = config_with({**FILE, **given})
    before = config.to_dict()
    settled, note = settle(config, list(given))
    settings = from_config(settled)
    assert settings.allocation.bits_per_value == 0
    flat = settled.to_dict()
    for field, value in given.items():
        section, _, name = field.rpartition(".")
        assert (flat[section] if section else flat)[name] == value
    named = next(field for field in given if field not in IN_COMPANY)
    if "trellis.bits" in given:  # the method alone would take the budget
        named = "trellis.bits"
    assert note.startswith("allocation.bits_per_value=3 of the config file is off, because ")
    assert f"--config.{named}" in note
    assert config.to_dict() == before


@pytest.mark.parametrize(
    "given, field",
    [
        ({"vq.dim": 4, "vq.bits": 2.0, "allocation.bits_per_value": 2.5}, "vq.dim"),
        ({"vq.bits": 2.0, "allocation.bits_per_value": 2.5}, "vq.bits"),
        ({"vq.bits": 2.0, "allocation.dims": (2, 4)}, "vq.bits"),
    ],
)
def test_a_format_beside_a_budget_on_one_command_line_is_refused(given, field):
    message = (
        rf"--config\.{field} has no effect under allocation.bits_per_value=.*; set "
        rf"--config\.allocation\.{field[3:].removesuffix('s')}s=.*, or "
        r"--config\.allocation\.bits_per_value=0 for one format in all layers"
    )
    with pytest.raises(ValueError, match=message):
        settle(config_with({**FILE, **given}), list(given))


@pytest.mark.parametrize(
    "given, field, what",
    [
        ({"allocation.bits": (2.0, 3.3, 7.0)}, "bits", "in 3.3, 7, which"),
        ({"allocation.dims": (2, 16)}, "dims", "in 16, which"),
    ],
)
def test_candidates_that_make_no_code_are_refused_where_they_are_named(given, field, what):
    config = config_with({**FILE, **given})
    with pytest.raises(ValueError, match=rf"^--config\.allocation\.{field} has no effect {what}"):
        settle(config, list(given))
    assert settle(config, ["seed"]) == (config, "")  # of a file's candidates some may be left out


@pytest.mark.parametrize(
    "given",
    [
        {"vq.dim": 2},  # the budget's layers are 2D as they are
        {"vq.dim": 2, "allocation.bits_per_value": 2.5},
        {"vq.dim": 1, "allocation.dims": (1,), "vq.seed": "cdf"},
        {"vq.polish_rounds": 2},
        {"vq.group_size": 0},
    ],
)
def test_a_field_that_agrees_with_the_budget_leaves_it(given):
    config = config_with({**FILE, **given})
    assert settle(config, list(given)) == (config, "")
