"""A sweep of settings on layers."""

import json

import numpy as np
import pytest

from gptvq_jax.config import from_config
from gptvq_jax.console.config_file import load_config
from gptvq_jax.core import metrics
from gptvq_jax.core.vq_tensor import dequantize
from gptvq_jax.methods.aqlm import AQLMSettings
from gptvq_jax.methods.gptvq import GPTVQSettings
from gptvq_jax.run.sizes import packed_bytes
from gptvq_jax.study.layer_benchmark import load_layer, quantize_with
from gptvq_jax.study.sweep import start
from gptvq_jax.study.sweep.axes import axis, sweep
from gptvq_jax.study.sweep.cells import resolve
from gptvq_jax.study.sweep.layers import wanted_layers

# Rows and columns of the six layers of SmolLM2-135M.
SHAPES = ((192, 576), (576, 1536), (576, 576), (1536, 576), (192, 576), (576, 576))


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


def stored_bits(settings, rows, cols):
    """As the README says: codes, and codebooks with a float16 scale each, or AQLM's in float16."""
    if isinstance(settings, AQLMSettings):
        books, width, dim = settings.num_codebooks, settings.code_bits, settings.dim
        return books * (rows * cols // dim * width + 2**width * dim * 16) + 16 * rows
    grid = settings.grid(rows, cols)
    of_group = settings.codebook_size * settings.dim * 8 + 16
    codes = rows * cols // settings.dim * settings.index_bits
    return codes + grid.row_strips * grid.col_strips * of_group


def test_stored_bits():
    settings = AQLMSettings(rounds=0)
    assert stored_bits(settings, 16, 64) == 8 * packed_bytes("aqlm", settings, 16, 64)
    settings = GPTVQSettings(bits=1.0, group_size=256, polish_rounds=0)
    assert stored_bits(settings, 16, 64) == 8 * packed_bytes("gptvq", settings, 16, 64)


def test_true_bits_of_a_row_agree():
    """The cells of the first figure that stand beside each other differ in nothing else."""
    cells = resolve(load_config("sweeps/smollm2_dimensionality:layers")).cells
    values = sum(rows * cols for rows, cols in SHAPES)
    for bits in ("2b", "3b", "4b"):
        row = [cell.settings for cell in cells if cell.point["bits"] == bits]
        assert len(row) == (4 if bits == "2b" else 3)
        assert any(isinstance(s.method_settings, AQLMSettings) for s in row)
        true = [sum(stored_bits(s.method_settings, *shape) for shape in SHAPES) for s in row]
        true = [bits / values for bits in true]
        assert max(true) - min(true) <= 0.01, (bits, true)
