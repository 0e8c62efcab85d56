"""The products of a run, by its config: what they change, and where it is said."""

import json

import numpy as np
import pytest
from documented import parsed
from tiny_run import config_file

from gptvq_jax.run.statistics import calibrate

pytestmark = pytest.mark.usefixtures("short_programs")

LAYERS = ("config.method = 'gptq'", "config.uniform.group_size = 16", "config.num_blocks = 1")


def rows(config, workdir, monkeypatch, *flags):
    """Of layers, and the summary, of a run by the script."""
    command = f"python scripts/quantize.py --config={config} --workdir={workdir} {' '.join(flags)}"
    with parsed(command, monkeypatch) as script:
        script.main([])
    *layers, summary = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["relative_error"] for row in layers], summary


def test_products_of_a_run_are_those_of_its_config(model_dir, text_files, tmp_path, monkeypatch):
    """Errors of layers move a little; a target that is solved for is first that of o_proj."""
    config = config_file(tmp_path / "c.py", model_dir, text_files, *LAYERS)
    of_hessians, of_models = "calibration.products=bfloat16", "evaluation.products=bfloat16"
    of_text = "calibration.model_products=bfloat16"
    plain, summary = rows(config, tmp_path / "plain", monkeypatch)
    both = (f"--config.{field}" for field in (of_hessians, of_models))
    rounded, of_rounded = rows(config, tmp_path / "rounded", monkeypatch, *both)
    solved, of_solved = rows(
        config, tmp_path / "solved", monkeypatch, "--config.solve_products=bfloat16x3"
    )
    narrow, of_narrow = rows(config, tmp_path / "narrow", monkeypatch, f"--config.{of_text}")
    for found in (rounded, narrow):
        assert all(a != b for a, b in zip(plain, found, strict=True))
    assert plain != solved
    for found in (rounded, narrow, solved):  # which a code more or less moves by a tenth
        np.testing.assert_allclose(found, plain, rtol=0.4)
        assert np.mean(found) == pytest.approx(np.mean(plain), rel=0.1)
    assert summary["evaluation"].endswith("multiplied in float32")
    assert "Hessians" not in summary["calibration"]
    assert of_rounded["calibration"].endswith("; Hessians of bfloat16")
    assert of_rounded["calibration_protocol"]["products"] == "bfloat16"
    assert of_narrow["calibration"].endswith("; the model in bfloat16")
    assert of_rounded["evaluation"].endswith("multiplied in bfloat16")
    before, after = summary["perplexity_float"], of_rounded["perplexity_float"]
    assert before != after and before == pytest.approx(after, rel=0.01)
    assert of_solved["perplexity_float"] == before


def test_statistics_are_of_the_products_of_their_config(tiny_config, tmp_path):
    tiny_config.num_blocks, sums = 1, {}
    fields = {"float32": {}, "hessians": {"products": "bfloat16"}}
    fields["model"] = {"model_products": "bfloat16"}
    for name, products in fields.items():
        tiny_config.calibration.update(products)
        file = tmp_path / f"{name}.npz"
        calibrate(tiny_config, str(file), [f"calibration.{field}" for field in products])
        tiny_config.calibration.update(dict.fromkeys(products, "float32"))
        with np.load(file) as arrays:
            sums[name] = {n: arrays[n] for n in arrays.files if n.endswith("total")}
    for name, total in sums["float32"].items():
        for of in ("hessians", "model"):
            apart = np.abs(total - sums[of][name]).max() / np.abs(total).max()
            assert 0 < apart < 0.02, (of, name)
    tiny_config.calibration.model_products = "bfloat16"
    with pytest.raises(ValueError, match="float32.npz holds other statistics"):
        calibrate(tiny_config, str(tmp_path / "float32.npz"))


@pytest.mark.parametrize(
    "flag, message",
    [
        ("calibration.products=fp8", "calibration.products='fp8' must be one of float32, bfloat16"),
        (
            "calibration.model_products=bfloat16x3",
            "calibration.model_products='bfloat16x3' must be one of float32, bfloat16",
        ),
        ("evaluation.products=bfloat16x3", "evaluation.products='bfloat16x3' must be one of float"),
        ("solve_products=bfloat16", "solve_products='bfloat16' must be one of float32, bfloat16x"),
        (
            "solve_products=bfloat16x3 --config.calibration.asymmetry=0.0",
            r"--config\.solve_products has no effect without an asymmetric target; set --con",
        ),
    ],
)
def test_what_cannot_be_is_one_line(flag, message, model_dir, text_files, tmp_path, monkeypatch):
    config = config_file(tmp_path / "c.py", model_dir, text_files)
    with pytest.raises(ValueError, match=message):
        rows(config, tmp_path / "run", monkeypatch, f"--config.{flag}")
