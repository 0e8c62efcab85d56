"""Config fields: wrong ones are refused with a line that names them."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from gptvq_jax.config import (
    CalibrationSettings,
    RunSettings,
    default_config,
    difference,
    evaluation_settings,
    from_config,
    to_dict,
)
from gptvq_jax.methods.aqlm import AQLMSettings
from gptvq_jax.methods.gptvq import GPTVQSettings
from gptvq_jax.methods.registry import METHODS


def test_defaults_round_trip():
    assert from_config(default_config()) == RunSettings()


def test_config_refuses_unknown_fields_and_wrong_types():
    config = default_config().lock()
    with pytest.raises((AttributeError, KeyError), match="dimm"):
        config.vq.dimm = 2
    with pytest.raises(TypeError):
        config.vq.dim = "two"
    extra = default_config()
    extra.vq.unlock()
    extra.vq.dimm = 2
    with pytest.raises(ValueError, match=r"config\.vq\.dimm is not a field"):
        from_config(extra)


@pytest.mark.parametrize(
    "section, field, value",
    [
        (None, "method", "awq"),
        (None, "damping", -1.0),
        (None, "dense_dtype", "int8"),
        ("calibration", "inputs", "both"),
        ("calibration", "seqlen", 1),
        ("calibration", "asymmetry", 1.5),
        ("vq", "bits", 2.25),
        ("vq", "seed", "farthest"),
        ("aqlm", "dim", 3),
        ("aqlm", "beam", 9),
        ("aqlm", "seed", "cdf"),
        ("uniform", "bits", 9),
    ],
)
def test_impossible_values_are_named(section, field, value):
    config = default_config()
    setattr(config[section] if section else config, field, value)
    with pytest.raises(ValueError, match=field):
        from_config(config)


BUDGET = {"allocation.bits_per_value": 2.5}


@pytest.mark.parametrize(
    "given, field",
    [
        ({"embeddings": "int4"}, "embeddings='int4'"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"calibration.seed": -1}, "calibration.seed=-1"),
        ({"allocation.bits_per_value": float("inf")}, "config.allocation.bits_per_value=inf"),
        ({"allocation.bits": (2.0, float("nan"))}, "config.allocation.bits=nan"),
        ({"vq.learning_rate": float("inf")}, "config.vq.learning_rate=inf"),
        ({"allocation.bits_per_value": -1.0}, "allocation.bits_per_value=-1.0"),
        ({"allocation.em_iterations": -1}, "allocation.em_iterations=-1"),
        *(({"allocation.measured": n}, f"allocation.measured={n}") for n in (-1, 1, 4)),
        ({**BUDGET, "allocation.bits": (1.25, 9.0)}, "allocation.bits=(1.25, 9.0)"),
        ({**BUDGET, "allocation.dims": ()}, "allocation.bits"),
        ({**BUDGET, "method": "gptq"}, "method='gptq'"),
        ({**BUDGET, "vq.group_size": 2176}, "vq.group_size=2176"),
        ({**BUDGET, "vq.seed": "cdf", "vq.dim": 1}, "vq.seed='cdf'"),  # not for dims=(2,)
        ({"calibration.gradient_groups": -1}, "calibration.gradient_groups=-1"),
        (
            {"calibration.gradient_groups": 2, "vq.scale_block_size": 32},
            "calibration.gradient_groups=2",
        ),
        (
            {"calibration.gradient_groups": 2, "vq.dim": 1, "vq.svd_rank": 4},
            "calibration.gradient_groups=2",
        ),
        ({"calibration.gradient_power": 0.0}, "calibration.gradient_power=0.0"),
        ({"calibration.gradient_power": 1.5}, "calibration.gradient_power=1.5"),
        ({"vq.polish_tolerance": 1.0}, "vq.polish_tolerance=1.0"),
        ({"vq.polish_judge": "other"}, "vq.polish_judge='other'"),
        ({"vq.polish_judge": "held_out", "calibration.held_out": 0}, "calibration.held_out=0"),
        ({"method": "rtn", "vq.polish_rounds": 3}, "vq.polish_rounds=3"),
        ({"tune.epochs": 0}, "tune.epochs=0"),
        ({"tune.batch_size": 0}, "tune.batch_size=0"),
        ({"tune.learning_rate": 0.0}, "tune.learning_rate=0.0"),
        ({"tune.b1": 1.0}, "tune.b1=1.0"),
        ({"tune.b2": -0.1}, "tune.b2=-0.1"),
        ({"tune.patience": 0}, "tune.patience=0"),
        ({"tune.tolerance": 1.0}, "tune.tolerance=1.0"),
        (
            {"tune.block": True, "calibration.inputs": "float", "calibration.asymmetry": 0.0},
            "calibration.inputs='float'",
        ),
        ({"tune.block": True, "calibration.num_windows": 3}, "tune.batch_size=4"),
        ({"tune.block": True, "calibration.held_out": 0}, "calibration.held_out=0"),
        ({"calibration.held_out": -1}, "calibration.held_out=-1"),
    ],
)
def test_options_that_exclude_each_other_are_named(given, field):
    config = default_config()
    config.update_from_flattened_dict(given)
    with pytest.raises(ValueError, match=rf"^{re.escape(field)}.* must be "):
        from_config(config)


@pytest.mark.parametrize(
    "given",
    [
        BUDGET,
        {**BUDGET, "calibration.gradient_groups": 4},
        {"calibration.gradient_groups": 1, "vq.scale_block_size": 32},
        {"method": "gptq", "vq.polish_rounds": 0},
        {"tune.block": True, "calibration.num_windows": 8},
        {"tune.block": True, "method": "gptq"},
        {"method": "gptq", "calibration.gradient_groups": 2, "vq.scale_block_size": 32},
    ],
)
def test_options_that_go_together(given):
    config = default_config()
    config.update_from_flattened_dict(given)
    assert from_config(config)


@pytest.mark.parametrize(
    "field, value, kind",
    [
        ("bits", ("two",), "float"),
        ("bits", (2.0, True), "float"),
        ("dims", (1.5, 2), "int"),
        ("dims", (True,), "int"),
    ],
)
def test_tuples_of_the_wrong_type_are_named(field, value, kind):
    config = default_config()
    config.allocation[field] = value
    message = rf"config\.allocation\.{field}={re.escape(repr(value))} must be a tuple of {kind}"
    with pytest.raises(ValueError, match=message):
        from_config(config)
    with pytest.raises(TypeError):  # ml_collections itself refuses what is no sequence
        config.allocation[field] = 2.0


def test_tuples_take_whole_numbers_and_lists():
    config = default_config()
    config.update_from_flattened_dict({"allocation.bits": (2, 3.5), "allocation.dims": [1, 2]})
    allocation = from_config(config).allocation
    assert (allocation.bits, allocation.dims) == ((2.0, 3.5), (1, 2))
    assert all(type(bits) is float for bits in allocation.bits)


def test_difference_names_the_fields():
    old = to_dict(RunSettings())
    new = to_dict(RunSettings(seed=1, vq=GPTVQSettings(dim=4, bits=2.0)))
    assert difference(old, new) == ["seed: 0 -> 1", "vq.bits: 3.0 -> 2.0", "vq.dim: 2 -> 4"]
    assert difference(old, dict(old)) == []


CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def get_config(name, *arg):
    """What the file makes of the part of --config after its colon."""
    (file,) = (file for file in CONFIGS if file.stem == name)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arg)


def test_every_config_file_builds():
    assert len(CONFIGS) > 10
    for file in CONFIGS:
        settings = from_config(get_config(file.stem))
        if file.stem.endswith("_aqlm"):
            assert settings.method == "aqlm" and settings.tune.block
        elif file.stem.endswith("_trellis"):
            assert settings.method == "trellis" and settings.allocation.bits_per_value in (
                2.125,
                3.085,
            )
        elif file.stem.endswith("_tune"):
            assert settings.tune.model and settings.method == "trellis"
            assert from_config(get_config(file.stem, "2d")).method == "gptvq"
        elif file.stem.endswith("_mixed"):
            assert [rule.pattern for rule in settings.recipe][1:] == ["embed_tokens"]
        else:
            assert settings.method == "gptvq" and settings.vq.dim == int(file.stem[-2])
        with pytest.raises(ValueError, match="9b"):
            get_config(file.stem, "9b")


@pytest.mark.parametrize(
    "code, changes",
    [
        ("2x8", {}),
        ("1x12", dict(num_codebooks=1, code_bits=12)),
        ("1x16", dict(num_codebooks=1, code_bits=16, seed="random")),
        ("2x12", dict(code_bits=12)),
        ("4x8g16", dict(num_codebooks=4, dim=16)),
        ("1x8g4", dict(num_codebooks=1, dim=4)),
        ("3x8", dict(num_codebooks=3, start="residual")),
    ],
)
@pytest.mark.parametrize("name", ["smollm2_135m_aqlm", "llama2_7b_aqlm", "mistral_7b_aqlm"])
def test_codes_of_aqlm_configs(name, code, changes):
    settings = from_config(get_config(name, code))
    assert settings.method_settings == settings.aqlm == AQLMSettings(**changes)
    bits = {"1x12": 1.5, "2x12": 3.0, "3x8": 3.0}.get(code, 2.0)
    assert settings.vq == GPTVQSettings(bits=bits)


def test_default_codes_of_aqlm_configs():
    small, large = (from_config(get_config(f"{n}_aqlm")) for n in ("smollm2_135m", "llama2_7b"))
    assert (small.aqlm.num_codebooks, small.aqlm.code_bits) == (2, 8)
    assert small.calibration.gradient_groups == 1
    assert (large.aqlm.num_codebooks, large.aqlm.code_bits) == (1, 16)
    assert large.calibration.num_windows * large.calibration.seqlen == 2**22  # tokens


@pytest.mark.parametrize("name", ["smollm2_135m_trellis", "llama2_7b_trellis", "llama3_8b_trellis"])
def test_any_number_is_a_budget_of_trellis_configs(name):
    settings = from_config(get_config(name, "2.5b"))
    assert settings.allocation.bits_per_value == settings.trellis.bits == 2.5
    assert settings.calibration.gradient_groups == 1
    for arg in ("2", "b", "0b", "6.5b", "2bb", "-2b"):
        with pytest.raises(ValueError, match=f"{arg!r} is not bits per value up to 6"):
            get_config(name, arg)


def test_named_budgets_are_those_of_the_2d_config():
    for arg in ("2b", "3b", "4b"):
        budgets = {
            from_config(get_config(f"smollm2_135m_{kind}", arg)).allocation.bits_per_value
            for kind in ("2d", "trellis")
        }
        assert len(budgets) == 1 and budgets != {float(arg[0])}


@pytest.mark.parametrize("code", ["", "2", "2x", "x8", "2x8g", "2X8", "2x8g8g8", "2x8 ", "-2x8"])
def test_malformed_codes_are_refused(code):
    message = f"{re.escape(repr(code))} is not of the form MxB or MxBgD"
    with pytest.raises(ValueError, match=message):
        get_config("smollm2_135m_aqlm", code)


@pytest.mark.parametrize(
    "code, field", [("0x8", "num_codebooks"), ("2x17", "code_bits"), ("2x8g12", "dim")]
)
def test_codes_out_of_range_are_refused(code, field):
    with pytest.raises(ValueError, match=rf"^aqlm\.{field}="):
        from_config(get_config("smollm2_135m_aqlm", code))


@pytest.mark.parametrize("arg, bits", [("2b", 2.0), ("3b", 3.0), ("4b", 4.0)])
def test_default_job_spends_at_most_an_eighth_of_a_bit_beside_codes(arg, bits):
    vq = from_config(get_config("smollm2_135m_2d", arg)).vq
    assert vq.bits == bits
    stored = vq.codebook_size * vq.dim * 8 + 16
    assert vq.row_scales
    for rows, cols in ((576, 576), (192, 576), (1536, 576), (576, 1536)):
        grid = vq.grid(rows, cols)
        assert grid.row_strips * grid.col_strips * stored / (rows * cols) + 16 / cols <= 0.125
    without_group_size = dataclasses.replace(vq, group_size=0)
    grid = without_group_size.grid(1536, 576)
    assert grid.row_strips * grid.col_strips * stored / (1536 * 576) <= 0.125


@pytest.mark.parametrize(
    "made_with, given, message",
    [
        (3, {}, r"config\.evaluation=3 must be a section"),
        ({"seqlen": "long"}, {}, r"config\.evaluation\.seqlen='long' must be of type int"),
        ({"windows": 3}, {}, r"config\.evaluation\.windows is not a field"),
    ],
)
def test_the_evaluation_of_a_checkpoint_is_checked(made_with, given, message):
    with pytest.raises(ValueError, match=message):
        evaluation_settings(made_with, given)


def test_the_evaluation_of_a_checkpoint_gives_way_to_what_is_given():
    settings = evaluation_settings({"seqlen": 64, "dataset": "ptb"}, {"seqlen": 32})
    assert (settings.seqlen, settings.dataset, settings.batch_size) == (32, "ptb", 4)


def test_a_config_file_that_returns_something_else_is_named():
    for value in (None, {"vq": {}}):
        with pytest.raises(ValueError, match=r"must return what default_config\(\) gives"):
            from_config(value)
    config = default_config()
    with config.ignore_type():
        config.vq = 3
    with pytest.raises(ValueError, match=r"config\.vq=3 must be a section of fields"):
        from_config(config)


@pytest.mark.parametrize(
    "name, arg, group_size, books",
    [
        ("smollm2_135m_2d", "2b", 128, 2),
        ("smollm2_135m_2d", "3b", 128, 3),
        ("smollm2_135m_2d", "4b", 128, 4),
        ("llama2_7b_2d", "2.25b", 64, 2),
        ("mistral_7b_1d", "4.125b", 128, 4),
    ],
)
def test_another_method_keeps_the_bits_of_the_config_argument(name, arg, group_size, books):
    config = get_config(name, arg)
    config.allocation.bits_per_value = 0.0
    for method in METHODS:
        config.method = method
        settings = from_config(config).method_settings
        if method == "aqlm":
            assert (settings.num_codebooks, settings.code_bits, settings.dim) == (books, 8, 8)
        else:
            assert settings.bits == int(arg[0])
    assert config.uniform.group_size == group_size


@pytest.mark.parametrize("code, bits", [("2x8", 2), ("3x8", 3), ("1x12", 2), ("16x16", 8)])
def test_uniform_grids_beside_aqlm_configs(code, bits):
    assert from_config(get_config("smollm2_135m_aqlm", code)).uniform.bits == bits


@pytest.mark.parametrize(
    "given, message",
    [
        ({"datasets": ()}, r"calibration.datasets=\(\) must be names, one at least"),
        ({"datasets": ("c4", "c4")}, "must be different texts; give one that counts more a weight"),
        ({"datasets": (1,)}, "must be a tuple of str"),
        ({"dataset_weights": (1.0, 2.0)}, "a number for each of the 1 calibration.datasets"),
        (
            {"datasets": ("c4", "ptb"), "dataset_weights": (1.0, 0.0)},
            r"\(1.0, 0.0\) must be above 0",
        ),
        (
            {"datasets": ("c4", "ptb"), "dataset_weights": (1.0, 0.01)},
            "num_windows=32 must be so many that ptb gets one of them; raise it, or its",
        ),
        ({"statistics": "a.npz"}, "calibration.inputs='quantized' must be 'float' with cal"),
        (
            {"statistics": "a.npz", "inputs": "float", "asymmetry": 0.0},
            "true_sequential=True must be False with calibration.statistics",
        ),
    ],
)
def test_calibration_texts_that_cannot_be_are_refused(given, message):
    config = default_config()
    config.update_from_flattened_dict({f"calibration.{name}": v for name, v in given.items()})
    with pytest.raises(ValueError, match=message):
        from_config(config)


def test_texts_share_the_windows_by_their_weights():
    weights = {"datasets": ("c4", "ptb", "wikitext2"), "dataset_weights": (2.0, 1.0, 1.0)}
    assert CalibrationSettings(**weights, held_out=4).mixture == {
        "c4": (16, 2),
        "ptb": (8, 1),
        "wikitext2": (8, 1),
    }
    equal = CalibrationSettings(datasets=("c4", "ptb", "wikitext2"))
    assert [fitted for fitted, _ in equal.mixture.values()] == [11, 11, 10]
