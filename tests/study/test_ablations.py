"""Ablations: every row changes something, rows come out right, a finished run is not run again."""

import dataclasses

import numpy as np
import pytest

from gptvq_jax.config import default_config, from_config
from gptvq_jax.methods.gptvq import GPTVQSettings
from gptvq_jax.run import job
from gptvq_jax.run.evaluate import Evaluation
from gptvq_jax.study import ablations
from gptvq_jax.study.layer_benchmark import VQ_SETTINGS


def test_choose_keeps_the_order_of_the_tables():
    assert ablations.choose(["model"], None) == {"model": list(ablations.MODEL_ROWS)}
    chosen = ablations.choose(["layers", "model"], ["no polish", "default"])
    assert chosen == {"layers": ["default", "no polish"], "model": ["default", "no polish"]}
    assert ablations.choose(["layers", "model"], ["int8 embedding"]) == {
        "model": ["int8 embedding"]
    }
    with pytest.raises(ValueError, match="unknown row 'magic'; choose from .*0 EM steps"):
        ablations.choose(["layers"], ["magic"])


@pytest.mark.parametrize("setting", VQ_SETTINGS)
def test_every_layer_row_differs_from_the_default_in_what_it_names(setting):
    default = GPTVQSettings(**VQ_SETTINGS[setting])
    for name, fields in list(ablations.LAYER_ROWS.items())[1:]:
        changed = dataclasses.replace(default, **fields)
        assert changed != default
        for field, value in fields.items():
            assert getattr(default, field) != value, (name, field)


def test_every_model_row_is_a_valid_config_that_differs_from_the_default():
    seen = []
    for name, fields in ablations.MODEL_ROWS.items():
        config = default_config()
        for field, value in fields.items():
            if field == "calibration.num_windows":
                value = int(config.calibration.num_windows * value)
            config.update_from_flattened_dict({field: value})
        settings = from_config(config)
        assert settings not in seen, name
        seen.append(settings)


def test_layer_row(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        x = rng.normal(size=(256, 16)).astype(np.float32)
        weight = rng.normal(size=(256, 16)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", weight=weight, hessian=x.T @ x / 256)
    files = sorted(tmp_path.glob("*.npz"))
    row = ablations.layer_row("no polish", "2d_2.125", files)
    assert (row["row"], row["setting"]) == ("no polish", "2d_2.125")
    parts = [ablations.layer_row("no polish", "2d_2.125", [file]) for file in files]
    errors = [part["relative_error"] for part in parts]
    assert row["relative_error"] == pytest.approx(np.sqrt(errors[0] * errors[1]), rel=1e-6)
    # 4-bit codes for pairs; two codebooks of 16 pairs in int8 with a 16-bit scale for 4096 weights.
    assert row["bits_per_value"] == pytest.approx(2 + 2 * (16 * 2 * 8 + 16) / 4096)


def counting(method, calls):
    """A method that notes whose it is."""

    def call(owner, *args):
        calls.append(owner)
        return method(owner, *args)

    return call


@pytest.mark.slow
def test_model_rows_are_runs_and_are_read_again(tiny_config, tmp_path, monkeypatch):
    visits = []
    monkeypatch.setattr(Evaluation, "begin", counting(Evaluation.begin, visits))
    first = ablations.model_row("default", tiny_config, tmp_path)
    more = ablations.model_row("twice the calibration windows", tiny_config, tmp_path)
    assert more["perplexity_float"] == first["perplexity_float"]
    # Each row has its quantized model, all of them the one float model.
    assert [type(visitor.source).__name__ for visitor in visits] == [
        *("HFSource", "PackedCheckpoint", "PackedCheckpoint")
    ]
    assert np.load(tmp_path / "twice_the_calibration_windows/tokens.npy").shape[0] == 12 + 2
    assert first["rise"] == pytest.approx(np.log(first["perplexity"] / first["perplexity_float"]))
    assert "bits per value" in (tmp_path / "default/report.txt").read_text()
    assert 0 < first["relative_error"] < 1 and 0 < first["held_out_error"] < 2

    monkeypatch.setattr(job, "quantize_model", None)
    monkeypatch.setattr(job, "write_figures", None)
    assert ablations.model_row("default", tiny_config, tmp_path) == first


def test_table_and_plot(tmp_path):
    rows = [
        {"row": "default", "rise": 0.5, "perplexity": 9.0, "bits_per_value": 2.1, "seconds": 3.0},
        {"row": "other", "rise": 0.4, "perplexity": 8.0, "bits_per_value": 2.0, "seconds": 4.0},
    ]
    lines = ablations.table(rows, "rise").splitlines()
    assert lines[0] == "| row | rise | against the first | perplexity | bits per value | seconds |"
    assert lines[3] == "| other | 0.40000 | 0.800 | 8.00 | 2.000 | 4.0 |"
    ablations.plot({"model": (rows, "rise")}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_held_out_errors_stand_beside_the_fitted_ones():
    row = {"bits_per_value": 2.1, "seconds": 3.0}
    layers = [
        {"row": "default", "relative_error": 0.02, "held_out_error": 0.04, **row},
        {"row": "other", "relative_error": 0.01, "held_out_error": 0.05, **row},
    ]
    lines = ablations.table(layers, "relative_error").splitlines()
    assert lines[0].startswith("| row | relative error | against the first | held out error | aga")
    assert lines[3] == "| other | 0.01000 | 0.500 | 0.05000 | 1.250 | 2.100 | 3.0 |"
    runs = [{**of, "rise": 0.5, "perplexity": 9.0} for of in layers]
    lines = ablations.table(runs, "rise").splitlines()
    assert lines[3] == (
        "| other | 0.50000 | 1.000 | 9.00 | 0.01000 | 0.500 | 0.05000 | 1.250 | 2.100 | 3.0 |"
    )
    # A row of an earlier version has none.
    del layers[1]["held_out_error"]
    assert "held out" not in ablations.table(layers, "relative_error")
