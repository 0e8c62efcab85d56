"""Config fields: wrong ones are refused with a line that names them."""

import dataclasses
import re

import pytest

from gptvq_jax.config import RunSettings, default_config, difference, from_config, to_dict
from gptvq_jax.gptvq import GPTVQSettings


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
        ("vq", "seed", "random"),
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
        ({"allocation.bits_per_value": -1.0}, "allocation.bits_per_value=-1.0"),
        ({"allocation.em_iterations": -1}, "allocation.em_iterations=-1"),
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
        ({"method": "rtn", "vq.polish_rounds": 3}, "vq.polish_rounds=3"),
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


def test_every_config_file_builds():
    import importlib.util
    from pathlib import Path

    files = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
    assert len(files) > 10
    for file in files:
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        settings = from_config(module.get_config())
        assert settings.vq.dim == int(file.stem[-2])
        with pytest.raises(ValueError, match="9b"):
            module.get_config("9b")


@pytest.mark.parametrize("arg, bits", [("2b", 2.0), ("3b", 3.0), ("4b", 4.0)])
def test_default_job_spends_at_most_an_eighth_of_a_bit_on_codebooks(arg, bits):
    import importlib.util
    from pathlib import Path

    file = Path(__file__).parents[2] / "configs/smollm2_135m_2d.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vq = from_config(module.get_config(arg)).vq
    assert vq.bits == bits
    stored = vq.codebook_size * vq.dim * 8 + 16
    for rows, cols in ((576, 576), (192, 576), (1536, 576), (576, 1536)):
        grid = vq.grid(rows, cols)
        assert grid.row_strips * grid.col_strips * stored / (rows * cols) <= 0.125
    without_group_size = dataclasses.replace(vq, group_size=0)
    grid = without_group_size.grid(1536, 576)
    assert grid.row_strips * grid.col_strips * stored / (1536 * 576) <= 0.125
