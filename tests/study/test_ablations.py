"""Ablations: every row changes something, rows come out right, a finished run is not run again."""

import dataclasses

import numpy as np
import pytest

from gptvq_jax.config import flat, from_config, to_dict
from gptvq_jax.console.config_file import load_config
from gptvq_jax.run import job
from gptvq_jax.run.evaluate import Evaluation
from gptvq_jax.run.overrides import ignored
from gptvq_jax.study import ablations
from gptvq_jax.study.ablation_rows import LAYER_ROWS, MODEL_ROWS, ROTATION
from gptvq_jax.study.layer_benchmark import VQ_SETTINGS, settings_of


def test_choose_keeps_the_order_of_the_tables():
    def choose(tables, rows, settings=("2d_2.125",), method="gptvq"):
        return ablations.choose(tables, rows, settings, method)

    assert choose(["model"], None) == {"model": list(MODEL_ROWS["gptvq"])}
    assert choose(["model"], None, method="trellis") == {"model": list(MODEL_ROWS["trellis"])}
    assert choose(["layers", "model"], ["no polish", "default"]) == {
        "2d_2.125": ["default", "no polish"],
        "model": ["default", "no polish"],
    }
    assert choose(["layers", "model"], ["int8 embedding"]) == {"model": ["int8 embedding"]}
    both = "2d_2.125", "trellis_2.13_l10"
    assert choose(["layers"], ["default"], both) == dict.fromkeys(both, ["default"])
    with pytest.raises(ValueError, match="unknown row 'magic'; choose from .*0 EM steps"):
        choose(["layers"], ["magic"])
    with pytest.raises(ValueError, match="unknown row 'L = 8'"):
        choose(["layers"], ["L = 8"])
    with pytest.raises(ValueError, match="--settings=2d_2.125 has no effect .*; it has default; "):
        choose(["layers"], ["L = 8"], both)
    with pytest.raises(ValueError, match="--settings=aqlm_2x8 must be one of 1d_2.125, .*trellis"):
        choose(["layers"], None, ("aqlm_2x8",))
    with pytest.raises(ValueError, match="method='rtn' of --config has no model rows; .*--tables"):
        choose(["model"], None, method="rtn")


@pytest.mark.parametrize("setting", [*VQ_SETTINGS, "trellis_2.13_l10", "trellis_3.08"])
def test_every_layer_row_differs_from_the_default_in_what_it_names(setting):
    method = ablations.method_of(setting)
    default, seen = settings_of(method)[setting], []
    for name, fields in list(LAYER_ROWS[method].items())[1:]:
        assert "," not in name
        own = {**fields}
        rotated = own.pop(ROTATION, False)
        changed = dataclasses.replace(default, **own)
        assert (changed, rotated) not in seen, name
        seen.append((changed, rotated))
        if name == f"L = {getattr(default, 'window_bits', None)}":
            continue  # the default itself, in the order of the others
        assert rotated or changed != default
        for field, value in own.items():
            assert getattr(default, field) != value, (name, field)


@pytest.mark.parametrize("base", ["smollm2_135m_2d:ablation", "smollm2_135m_trellis:2b"])
def test_every_model_row_is_a_valid_config_that_differs_in_what_counts(base):
    seen, base = [], load_config(base)
    for name, fields in MODEL_ROWS[base.method].items():
        assert "," not in name  # --rows has commas between names
        config = base.copy_and_resolve_references()
        for field, value in fields.items():
            if field == "calibration.num_windows":
                value = int(config.calibration.num_windows * value)
            config.update_from_flattened_dict({field: value})
        settings = from_config(config)
        reasons = ignored(settings)
        assert not reasons.keys() & fields.keys(), name
        effective = {f: v for f, v in flat(to_dict(settings)).items() if f not in reasons}
        assert effective not in seen, name
        seen.append(effective)


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


def test_rows_of_trellis_codes(tmp_path):
    """One column and one weight that stand out: rates and outliers take them, or a rotation."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 48)) * np.where(np.arange(48) == 3, 20, 1)
    weight = rng.normal(size=(96, 48)).astype(np.float32)
    weight[5, 3] = 40.0
    np.savez(tmp_path / "a.npz", weight=weight, hessian=(x.T @ x / 512).astype(np.float32))

    def error(name):
        row = ablations.layer_row(name, "trellis_2.13_l10", [tmp_path / "a.npz"])
        assert row["bits_per_value"] <= 2.133
        return row["relative_error"]

    names = ("L = 6", "one rate for all columns", "one rate + no outliers")
    default, short, one_rate, neither = (error(name) for name in ("default", *names))
    assert default < min(short, one_rate) and one_rate < neither
    assert error("rotation + one rate + no outliers") < neither


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
