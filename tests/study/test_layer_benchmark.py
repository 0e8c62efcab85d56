"""The layer benchmark on a small layer: rows, selection, summary, comparison, errors."""

import json
import math

import numpy as np
import pytest

from gptvq_jax.methods.aqlm import AQLMSettings
from gptvq_jax.study.layer_benchmark import (
    ONLY_BY_NAME,
    choose,
    compare,
    measure_all,
    measure_memory,
    read_rows,
    settings_of,
    summarize,
)

FIELDS = {
    "layer",
    "method",
    "setting",
    "relative_error",
    "sqnr_db",
    "bits_per_value",
    "seconds_cold",
    "seconds",
}


@pytest.fixture
def layers(tmp_path):
    rng = np.random.default_rng(0)
    # Correlated, or feeding an error back gains little.
    x = (rng.normal(size=(256, 48)) @ rng.normal(size=(48, 48))).astype(np.float32)
    weight = rng.normal(size=(32, 48)).astype(np.float32)
    np.savez(tmp_path / "block0.q_proj.npz", weight=weight, hessian=2 * x.T @ x / 256)
    return tmp_path


def row(layer, method, setting, error, cold, warm):
    return {
        "layer": layer,
        "method": method,
        "setting": setting,
        "relative_error": error,
        "seconds_cold": cold,
        "seconds": warm,
    }


def test_rows(layers, tmp_path):
    rows = list(measure_all(layers, choose(["rtn", "gptq"], ["int3_g128"])))
    assert [row["method"] for row in rows] == ["rtn", "gptq"]
    assert all(set(row) == FIELDS and row["layer"] == "block0.q_proj" for row in rows)
    assert rows[1]["relative_error"] < 0.8 * rows[0]["relative_error"]
    # One 16-bit scale per row of 48 weights, and the 8 levels once.
    assert rows[0]["bits_per_value"] == pytest.approx(3 + 16 / 48 + 8 * 16 / (32 * 48))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert read_rows(tmp_path / "rows.json") == rows
    assert set(compare(rows[0], rows).values()) == {1.0}


def test_settings_are_named_by_dimension_and_bits():
    settings = settings_of("gptvq")
    names = ["1d_2.125", "2d_2.125", "2d_3.083", "4d_2.222", "2d_2.125_rows", "2d_3.083_rows"]
    assert list(settings) == names
    for name in names[1:3]:  # with row scales at most as many true bits
        plain, scaled = (settings[n].grid(576, 576) for n in (name, f"{name}_rows"))
        saved = plain.row_strips * plain.col_strips - scaled.row_strips * scaled.col_strips
        less = saved * (settings[name].codebook_size * 2 * 8 + 16) - 16 * 576
        assert 0 <= less < 0.01 * 576 * 576 * settings[name].bits


def test_settings_of_trellis_are_named_by_true_bits():
    settings = settings_of("trellis")
    assert settings["trellis_2.13"].bits == 2.133 and settings["trellis_3.08"].bits == 3.085
    assert {s.window_bits for s in settings.values()} == {10, 12}
    pairs = choose(["trellis"], ["trellis_2.13"])
    assert pairs == [("trellis", "trellis_2.13")]
    of_aqlm = [name for name in settings if name in ONLY_BY_NAME]
    assert not {*of_aqlm} & {name for _, name in choose(["trellis"], None)}
    aqlm, shapes = (
        settings_of("aqlm")["aqlm_2x8"],
        ((576, 1536), (1536, 576), (576, 576), (192, 576)),
    )
    for name, (rows, cols) in zip(of_aqlm, shapes, strict=True):
        values = rows * cols
        codebooks = aqlm.num_codebooks * (values // 8 + 2**8 * 8 * 2) + 2 * rows  # bytes
        assert 0 <= codebooks - settings[name].budget_bytes(rows, cols) < 1e-4 * values
        assert f"{8 * codebooks / values:.3f}".startswith(name.removeprefix("trellis_"))


def test_settings_of_aqlm_are_named_by_codebooks_and_bits():
    settings = settings_of("aqlm")
    codes = ("1x8", "1x12", "2x8", "4x8", "8x8", "1x16")
    assert list(settings) == [f"aqlm_{code}" for code in codes]
    for name, of_name in settings.items():
        assert isinstance(of_name, AQLMSettings)
        assert name == f"aqlm_{of_name.num_codebooks}x{of_name.code_bits}"
    # 4x8 of 16 weights takes the 2 bits per weight that the others take but 1x12 and 8x8.
    bits = [s.num_codebooks * s.code_bits / s.dim for s in settings.values()]
    assert bits == [2, 1.5, 2, 2, 4, 2]


def test_what_takes_long_is_measured_only_by_name():
    assert "aqlm_1x16" in ONLY_BY_NAME
    names = [setting for _, setting in choose(["gptvq", "aqlm"], None)]
    assert names == [*settings_of("gptvq"), *list(settings_of("aqlm"))[:-1]]
    both = choose(["gptvq", "aqlm"], ["aqlm_1x16", "aqlm_2x8"])
    assert both == [("aqlm", "aqlm_2x8"), ("aqlm", "aqlm_1x16")]


def test_choose_keeps_the_settings_that_a_method_has():
    pairs = choose(["gptvq", "rtn"], ["2d_2.125", "int3_g128"])
    assert pairs == [("gptvq", "2d_2.125"), ("rtn", "int3_g128")]
    assert choose(["rtn"], None) == [("rtn", f"int{bits}_g128") for bits in (2, 3, 4)]


def test_memory_row():
    got = measure_memory(40, 256, "rtn", "int3_g128")
    assert (got["method"], got["setting"]) == ("rtn", "int3_g128")
    assert 0 < got["memory_before_bytes"] <= got["peak_memory_bytes"]
    assert 0 < got["relative_error"] < 1 and got["seconds_cold"] > 0
    # One 16-bit scale per 128 weights, and the 8 levels once.
    assert got["bits_per_value"] == pytest.approx(3 + 16 / 128 + 8 * 16 / (40 * 256))


def test_ratios_are_those_of_the_earlier_row_of_the_layer_and_setting():
    new = row("a", "gptvq", "2d", 0.02, 6.0, 1.0)
    earlier = [
        row("a", "gptvq", "4d", 1, 1, 1),
        row("b", "gptvq", "2d", 1, 1, 1),
        row("a", "other", "2d", 0.04, 2.0, 4.0),
    ]
    other = {"relative_error": 0.5, "seconds_cold": 3.0, "seconds": 0.25}
    assert compare(new, earlier) == other
    assert compare(new, [*earlier, row("a", "gptvq", "2d", 0.02, 1.0, 1.0)]) == {
        "relative_error": 1.0,
        "seconds_cold": 6.0,
        "seconds": 1.0,
    }
    assert compare(row("c", "gptvq", "2d", 1, 1, 1), earlier) is None
    with pytest.raises(ValueError, match="2 earlier rows compare with a gptvq 2d"):
        compare(new, [*earlier, row("a", "third", "2d", 1, 1, 1)])


def test_an_exact_layer_compares():
    exact, lossy = row("a", "m", "s", 0.0, 1, 1), row("a", "m", "s", 0.1, 1, 1)
    assert compare(exact, [exact])["relative_error"] == 1
    assert compare(lossy, [exact])["relative_error"] == math.inf
    assert summarize([exact, lossy], [None, None])[0]["relative_error"] == 0


def test_summary():
    rows = [
        row("a", "gptvq", "2d", 0.01, 3.0, 1.0),
        row("a", "gptvq", "4d", 0.5, 1.0, 1.0),
        row("b", "gptvq", "2d", 0.04, 5.0, 2.0),
        row("c", "gptvq", "2d", 0.02, 1.0, 4.0),
    ]
    earlier = [row("a", "x", "2d", 0.02, 1.0, 1.0), row("b", "x", "2d", 0.02, 5.0, 8.0)]
    first, second = summarize(rows, [compare(r, earlier) for r in rows])
    assert first == {
        "method": "gptvq",
        "setting": "2d",
        "layers": 3,
        "relative_error": pytest.approx(0.02),
        "seconds_cold": 9.0,
        "seconds": 7.0,
        "compared": 2,
        "ratios": {
            "relative_error": (pytest.approx(1.0), 2.0),
            "seconds_cold": (pytest.approx(math.sqrt(3)), 3.0),
            "seconds": (pytest.approx(0.5), 1.0),
        },
    }
    assert (second["setting"], second["layers"], second["compared"]) == ("4d", 1, 0)
    assert second["ratios"] == {}


@pytest.mark.parametrize(
    "text",
    ["", "rows", "3", "[3]", "[]", "{}", '{"layer": 1}', '[{"layer": "a", "method": "gptvq"}]'],
)
def test_a_file_of_something_else_is_not_compared(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="rows.json does not hold rows of this benchmark"):
        read_rows(path)


def test_a_row_whose_numbers_are_not_numbers(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row("a", "m", "s", "0.1", 1, 1)]))
    with pytest.raises(ValueError, match="--json"):
        read_rows(path)


def test_errors(layers, tmp_path):
    with pytest.raises(ValueError, match="unknown method 'awq'"):
        choose(["awq"], None)
    with pytest.raises(ValueError, match="unknown setting '3d'"):
        choose(["gptvq"], ["3d"])
    with pytest.raises(FileNotFoundError, match="--layers"):
        list(measure_all(tmp_path / "none", choose(["gptvq"], None)))
    with pytest.raises(FileNotFoundError, match="make it with --json"):
        read_rows(tmp_path / "none.json")
    np.savez(layers / "other.npz", w=np.zeros(3))
    with pytest.raises(ValueError, match="must hold 'weight' and 'hessian'"):
        list(measure_all(layers, choose(["rtn"], ["int3_g128"])))
