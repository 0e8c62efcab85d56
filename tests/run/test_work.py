"""FLOP by stage are those that a run counts, and bytes those that it reads and writes."""

import dataclasses

import pytest
from tiny_run import model_dir, text_files, tiny_config  # noqa: F401 - fixtures

from gptvq_jax.config import from_config
from gptvq_jax.console.json_file import read_json_lines
from gptvq_jax.models.open import open_source
from gptvq_jax.run.disk import disk_items, disk_peak
from gptvq_jax.run.job import quantize
from gptvq_jax.run.memory import memory_items, peaks
from gptvq_jax.run.work import run_flop, search_flop
from gptvq_jax.study.plan.traffic import stage_bytes


@pytest.mark.slow
def test_a_run_counts_what_was_said(tiny_config, tmp_path):  # noqa: F811
    """With an asymmetric target, token weights, a budget and windows held out."""
    tiny_config.calibration.asymmetry, tiny_config.calibration.gradient_groups = 0.25, 1
    tiny_config.vq.group_size, tiny_config.vq.codebook_overhead = 0, 0.5
    tiny_config.allocation.bits_per_value = 1.6
    tiny_config.allocation.bits = (0.5, 1.0, 1.5)
    quantize(tiny_config, str(tmp_path))
    summary = read_json_lines(tmp_path / "metrics.jsonl")[-1]
    config, settings = open_source(tiny_config.model).config, from_config(tiny_config)
    counted = {k: v["tflop"] for k, v in summary["stages"].items() if v["tflop"]}
    said = run_flop(config, settings)
    assert set(said) == set(counted)
    for stage, flop in said.items():
        rel = 0.05 if stage == "quantize" else 1e-6  # which candidates it got is not known before
        assert flop / 1e12 == pytest.approx(counted[stage], rel=rel), stage
    for stage in ("forward", "gradients", "hessians", "advance"):
        row = summary["stages"][stage]
        moved = row["bytes_read"] + row["bytes_written"]
        # Of arrays that are read once; with an asymmetric target some are read again.
        assert 0.45 * moved < stage_bytes(config, settings)[stage].moved < 1.1 * moved, stage
    assert settings.allocation.bits_per_value and search_flop(config, settings) == 0


def test_a_run_without_gradients_has_no_stages_of_them(tiny_config):  # noqa: F811
    config, settings = open_source(tiny_config.model).config, from_config(tiny_config)
    assert set(run_flop(config, settings)) == {"hessians", "advance", "quantize", "evaluate"}
    tiny_config.calibration.asymmetry, tiny_config.tune.block = 0.25, True
    more = run_flop(config, from_config(tiny_config))
    assert set(more) == {"forward", "hessians", "advance", "quantize", "tune", "evaluate"}
    tiny_config.tune.epochs = 2 * tiny_config.tune.epochs
    twice = run_flop(config, from_config(tiny_config))["tune"]
    assert 1.8 * more["tune"] < twice < 2 * more["tune"]


def test_memory_and_disk_grow_with_what_they_are_of(tiny_config):  # noqa: F811
    config = open_source(tiny_config.model).config

    def sizes():
        settings = from_config(tiny_config)
        memory = {}
        for item in memory_items(config, settings, "gpu"):
            memory[item.name] = max(memory.get(item.name, 0), item.num_bytes)
        return memory, disk_peak(disk_items(config, settings))[0]

    memory, disk = sizes()
    # Block: 4 x 48^2 + 3 x 48 x 128 weights and two norms, float32; sums of 48 or 128 inputs twice.
    assert memory["block"] == 4 * (4 * 48**2 + 3 * 48 * 128 + 2 * 48)
    assert memory["sums of x x^T"] == 2 * 4 * 128**2
    tiny_config.calibration.num_windows *= 4
    assert sizes()[0] == memory and sizes()[1] > disk  # more text takes disk alone
    tiny_config.calibration.held_out = 0
    assert sizes()[0]["sums of x x^T"] == 4 * 128**2
    tiny_config.evaluation.batch_size *= 2
    tiny_config.evaluation.num_windows *= 2
    assert sizes()[0]["activations"] > memory["activations"]


def test_memory_does_not_grow_with_depth(tiny_config):  # noqa: F811
    settings = from_config(tiny_config)
    config = open_source(tiny_config.model).config
    found = [
        peaks(memory_items(dataclasses.replace(config, num_hidden_layers=n), settings, "cpu"), True)
        for n in (4, 32)
    ]
    assert found[0] == found[1]
