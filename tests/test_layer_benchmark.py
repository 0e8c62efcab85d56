"""The layer benchmark on a small layer: rows, selection, errors."""

import numpy as np
import pytest

from gptvq_jax.layer_benchmark import measure_all, settings_of

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
    x = rng.normal(size=(256, 48)).astype(np.float32)
    weight = rng.normal(size=(32, 48)).astype(np.float32)
    np.savez(tmp_path / "block0.q_proj.npz", weight=weight, hessian=2 * x.T @ x / 256)
    return tmp_path


def test_rows(layers):
    rows = list(measure_all(layers, ["rtn", "gptq"], ["int3_g128"]))
    assert [row["method"] for row in rows] == ["rtn", "gptq"]
    assert all(set(row) == FIELDS and row["layer"] == "block0.q_proj" for row in rows)
    assert rows[1]["relative_error"] < rows[0]["relative_error"]
    # One 16-bit scale per row of 48 weights, and the 8 levels once.
    assert rows[0]["bits_per_value"] == pytest.approx(3 + 16 / 48 + 8 * 16 / (32 * 48))


def test_settings_are_named_by_dimension_and_bits():
    assert list(settings_of("gptvq")) == ["1d_2.125", "2d_2.125", "2d_3.083", "4d_2.222"]


def test_errors(layers, tmp_path):
    with pytest.raises(ValueError, match="unknown method 'awq'"):
        list(measure_all(layers, ["awq"], None))
    with pytest.raises(ValueError, match="unknown setting '3d'"):
        list(measure_all(layers, ["gptvq"], ["3d"]))
    with pytest.raises(FileNotFoundError, match="--layers"):
        list(measure_all(tmp_path / "none", ["gptvq"], None))
    np.savez(layers / "other.npz", w=np.zeros(3))
    with pytest.raises(ValueError, match="must hold 'weight' and 'hessian'"):
        list(measure_all(layers, ["rtn"], ["int3_g128"]))
