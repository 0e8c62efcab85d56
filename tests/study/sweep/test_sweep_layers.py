"""A sweep of settings on layers."""

import json

import numpy as np
import pytest

from gptvq_jax.config import from_config
from gptvq_jax.core import metrics
from gptvq_jax.core.vq_tensor import dequantize
from gptvq_jax.study.layer_benchmark import load_layer, quantize_with
from gptvq_jax.study.sweep import start
from gptvq_jax.study.sweep.axes import axis, sweep
from gptvq_jax.study.sweep.layers import wanted_layers


def test_a_setting_is_measured_on_text_that_nothing_was_fitted_to(tiny_config, tmp_path):
    tiny_config.method = "gptq"
    config = sweep("layers", tiny_config, [axis("uniform.bits", (2, 4))], kind="layers")
    assert start.sweep(config, "tiny.py", (), str(tmp_path)) == []
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["cell"] for row in rows] == ["bits2", "bits4"]
    assert rows[0]["relative_error"] > 4 * rows[1]["relative_error"]
    (folder,) = (tmp_path / "shared").glob("layers-*")
    files = sorted(folder.glob("*.npz"))
    tiny_config.uniform.bits = 2
    settings = from_config(tiny_config)
    assert len(rows[0]["layers"]) == len(files) == 6
    for row, file in zip(rows[0]["layers"], files, strict=True):
        weight, hessian = load_layer(file)
        tensor, _ = quantize_with(weight, hessian, "gptq", settings.uniform, "layer")
        other = np.load(file)["held_out"]
        assert not np.allclose(other, hessian, rtol=0.01)
        error = float(metrics.relative_error(weight, dequantize(tensor), other))
        assert row["layer"] == file.stem and row["relative_error"] == pytest.approx(error, rel=1e-5)
        assert row["sqnr_db"] == pytest.approx(-10 * np.log10(error), rel=1e-4)
    errors = [row["relative_error"] for row in rows[0]["layers"]]
    assert rows[0]["relative_error"] == pytest.approx(np.exp(np.mean(np.log(errors))))
    assert rows[0]["sqnr_db"] == pytest.approx(-10 * np.log10(rows[0]["relative_error"]), rel=1e-4)


def test_layers_of_other_depths():
    config = type("Config", (), {"num_hidden_layers": 1})
    assert sum(map(len, wanted_layers(config).values())) == 6 and set(wanted_layers(config)) == {0}
    config.num_hidden_layers = 30
    assert set(wanted_layers(config)) == {0, 14, 29}
