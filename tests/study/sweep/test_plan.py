"""What a sweep will take: by arithmetic, and by cells that are finished."""

import pytest
from tiny_sweeps import in_step, run

from gptvq_jax.study.sweep import start
from gptvq_jax.study.sweep.estimate import seconds


def test_the_plan_goes_by_finished_cells(base, tmp_path, capsys):
    config = in_step(base)
    run(config, tmp_path, cells="asymmetry0$")
    assert "[00:00, ETA at least " in capsys.readouterr().err  # before the cell
    start.plan(config, "tiny.py", (), str(tmp_path))
    out, errors = capsys.readouterr()
    assert "2 cells, 1 finished" in out and "as 1 finished cells took" in out
    assert "measuring" not in errors


def test_seconds_go_by_finished_cells_where_there_are_some():
    flop = {"a": 1e12, "b": 3e12}
    assert seconds(flop, ["a", "b"], 2e12, {}, lambda: 1e12).value == 6.0
    known = seconds(flop, ["b"], 0.0, {"a": {"seconds": 10.0}}, None)
    assert known.value == pytest.approx(30.0) and known.basis == "as 1 finished cells took"
