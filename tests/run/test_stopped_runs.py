"""What a run that was stopped and went on says of its work: that of its last part, and no more."""

import json

import pytest
from kills import Changes, commit, run
from tiny_run import NUM_BLOCKS

from gptvq_jax.console.report import summary_text
from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.console.time_table import time_table
from gptvq_jax.run import job

LAST = NUM_BLOCKS - 1
VISITS = [("Backward", 1), ("Quantize", 0), ("Quantize", 1), ("Evaluation of quantized", LAST)]


@pytest.fixture
def config(tiny_config):
    """Every pass, and every stage that multiplies."""
    config = tiny_config
    config.vq.group_size, config.vq.codebook_overhead = 0, 0.5
    config.allocation.bits_per_value, config.allocation.bits = 1.2, (0.5, 1.0)
    config.calibration.asymmetry = 0.25
    config.tune.block, config.tune.epochs = True, 1
    return config


@pytest.fixture
def parts(monkeypatch):
    """The stopwatches of runs."""
    made = []

    def make():
        made.append(Stopwatch())
        return made[-1]

    monkeypatch.setattr(job, "Stopwatch", make)
    return made


def stop_after(visit, config, path):
    """A run up to where a visit counts as done."""
    last = commit(visit, NUM_BLOCKS)

    def stop(_):
        if changes.made[-1] == last:
            raise KeyboardInterrupt

    changes = Changes(path, lambda _: None, stop)
    with changes.watched(), pytest.raises(KeyboardInterrupt):
        run(config, path)


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def operations(summary):
    """FLOP by stage."""
    stages = {name: row["tflop"] for name, row in summary["stages"].items()}
    return {name: 1e12 * tflop for name, tflop in stages.items() if tflop}


def test_the_parts_of_a_stopped_run_have_the_operations_of_the_whole(config, tmp_path, parts):
    """None is counted twice or left out, and each part has its own."""
    run(config, tmp_path / "whole")
    whole = rows(tmp_path / "whole")[-1]
    assert whole["resumed_at"] is None and "stopped" not in summary_text(whole)
    expected = operations(whole)
    for visit in VISITS:
        path = tmp_path / " ".join(map(str, visit))
        parts.clear()
        stop_after(visit, config, path)
        run(config, path)
        of_parts = [operations(stopwatch.summary()) for stopwatch in parts]
        assert len(parts) == 2 and expected.keys() == of_parts[0].keys() | of_parts[1].keys()
        for stage, flop in expected.items():
            total = sum(of_part.get(stage, 0.0) for of_part in of_parts)
            assert total == pytest.approx(flop, rel=1e-9), (visit, stage)
        *layers, summary = rows(path)
        assert operations(summary) == of_parts[1]  # and not one of another part
        assert "; the run was stopped before" in summary_text(summary)
        assert summary["resumed_at"] == {
            "Quantize": visit[1] + 1,
            "Evaluation of quantized": NUM_BLOCKS,
        }.get(visit[0], 0)
        total = 1e12 * (summary["totals"]["tflop"] or 0.0)  # None where all was done before
        assert total == pytest.approx(sum(of_parts[1].values()))
        # The lines of layers are a part of the stage that they are in.
        within = [row["seconds"] for row in layers if row["kind"] == "layer"]
        assert len(within) == 7 * NUM_BLOCKS
        shown = [line for line in time_table([*layers, summary]).splitlines() if line[:2] == "  "]
        seconds = sum(float(line[20:29]) for line in shown)
        of_stage = summary["stages"].get("quantize", {"seconds": 0.0})["seconds"]
        assert seconds <= of_stage + 0.05 * len(shown)
