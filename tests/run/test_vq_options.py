"""Options of GPTVQ on the command line, each by what it must do to a run of the real script."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_run import config_file

from gptvq_jax.models.llama import get_layer
from gptvq_jax.storage.checkpoint import PackedCheckpoint

SCRIPT = Path(__file__).parents[2] / "scripts/quantize.py"


@pytest.fixture
def layers_of(tmp_path, model_dir, text_files):
    """flags -> (rows of metrics.jsonl, packed layers) of the first block."""
    lines = "config.vq.bits, config.vq.em_iterations, config.vq.polish_rounds = 1.0, 2, 1"
    config = config_file(
        tmp_path / "tiny.py", model_dir, text_files, lines, "config.num_blocks = 1"
    )

    def run(name, *flags):
        words = [sys.executable, SCRIPT, f"--config={config}", f"--workdir={tmp_path / name}"]
        done = subprocess.run([*map(str, words), *flags], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        packed = PackedCheckpoint(tmp_path / name / "checkpoint").packed_block(0)
        return [row for row in rows if row["kind"] == "layer"], packed

    return run


@pytest.mark.slow
def test_what_the_flags_name_is_in_the_checkpoint(layers_of):
    base, _ = layers_of("base")
    scaled, packed = layers_of("scaled", "--config.vq.row_scales=True")
    searched, _ = layers_of("searched", "--config.vq.beam=4")
    long, _ = layers_of("long", "--config.vq.dim=4", "--config.vq.bits=3")
    errors = [
        np.mean([np.log(row["relative_error"]) for row in rows]) for rows in (base, searched, long)
    ]
    assert errors[1] < errors[0] and errors[2] < errors[0]
    for one, other in zip(base, scaled, strict=True):
        assert one["layer"] == other["layer"]
        tensor = get_layer(packed, one["layer"])["kernel"]
        cols = tensor.shape[1]
        assert other["bits_per_value"] - one["bits_per_value"] == pytest.approx(16 / cols)
        assert tensor.row_scales is not None
    assert {row["index_bits"] for row in long} == {12}


@pytest.mark.slow
def test_polish_judged_by_held_out_windows_stops_where_they_gain_no_more(layers_of):
    rounds = ["--config.vq.polish_rounds=8", "--config.vq.polish_tolerance=0"]
    fitted, _ = layers_of("fitted", *rounds)
    judged, _ = layers_of("judged", *rounds, "--config.vq.polish_judge=held_out")
    first = [row["layer"] for row in fitted if row["layer"].startswith("self_attn/q")]
    pairs = [(a, b) for a, b in zip(fitted, judged, strict=True) if a["layer"] in first]
    assert pairs and all(a["held_out_error"] >= b["held_out_error"] for a, b in pairs)
    # Little text is fitted to: some layer goes on to fit it, and is worse for the other.
    assert any(
        a["relative_error"] < b["relative_error"] and a["held_out_error"] > b["held_out_error"]
        for a, b in zip(fitted, judged, strict=True)
    )
