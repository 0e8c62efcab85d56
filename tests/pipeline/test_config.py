"""Config fields: wrong ones are refused with a line that names them."""

import dataclasses

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
