"""What cells share is made once, and every cell is as a run alone."""

import json
import os
from collections import Counter

import pytest
from tiny_sweeps import (
    CASES,
    budgets,
    counted,
    in_step,
    manifest,
    of_float_inputs,
    rows,
    run,
    weighted,
)

from gptvq_jax.files.disk_space import directory_bytes
from gptvq_jax.run import job
from gptvq_jax.run.workdir import WorkDir

SLOW = (budgets, in_step, of_float_inputs)


@pytest.mark.parametrize(
    "make",
    [pytest.param(make, marks=[pytest.mark.slow] * (make in SLOW)) for make in CASES],
    ids=lambda make: make.__name__,
)
def test_cells_share_what_they_can_and_are_as_runs_alone(make, base, tmp_path, capsys):
    config = make(base)
    with counted() as visits:
        assert run(config, tmp_path / "sweep") == []
    assert {name: count for name, count in visits.items() if count} == CASES[make]
    record = json.loads((tmp_path / "sweep/sweep.json").read_text())
    results = rows(tmp_path / "sweep")
    assert list(results) == [cell["name"] for cell in record["cells"]] and len(results) == 2
    for cell in record["cells"]:
        alone = base.copy_and_resolve_references()
        alone.update_from_flattened_dict(cell["fields"])
        summary = job.quantize(alone, str(tmp_path / cell["name"]))
        path = tmp_path / "sweep" / cell["workdir"]
        assert manifest(path) == manifest(tmp_path / cell["name"])
        row = results[cell["name"]]
        assert row["status"] == "done" and row["error"] is None and row["resumed_at"] is None
        for name in ("perplexity_float", "perplexity_quantized", "bits_per_value"):
            assert row[name] == summary[name]
        assert not list((path / "activations").iterdir())
    assert len({manifest(tmp_path / "sweep" / cell["workdir"]) for cell in record["cells"]}) == 2
    # Nobody reads them any more.
    assert not list((tmp_path / "sweep").glob("shared/*/activations/*"))
    lines = (tmp_path / "sweep/results.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("cell,status,bits_per_value,perplexity_quant")
    with counted() as visits:  # given again, there is nothing to do
        run(config, tmp_path / "sweep")
    assert not +visits
    assert "done" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cell_without_links_is_the_same(base, tmp_path, monkeypatch):
    config = weighted(base)
    run(config, tmp_path / "links")

    def refuse(*_):
        raise OSError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    with counted() as visits:
        run(config, tmp_path / "copies")
    assert +visits == Counter(CASES[weighted])
    for name in rows(tmp_path / "links"):
        assert manifest(tmp_path / "links/cells" / name) == manifest(
            tmp_path / "copies/cells" / name
        )


def test_what_was_lent_counts_for_nothing_in_the_room_that_a_cell_needs(
    base, tmp_path, monkeypatch
):
    """A run alone makes three points of each stream; here they are there, and give no room."""
    needs, check = [], WorkDir.check_room

    def keeping(workdir, num_bytes, *kept):
        present = sum(directory_bytes(workdir.path, pattern) for pattern in kept)
        needs.append((workdir.path.name, num_bytes - present))
        check(workdir, num_bytes, *kept)

    monkeypatch.setattr(WorkDir, "check_room", keeping)
    run(in_step(base), tmp_path / "sweep", cells="0.25")
    cell = dict(needs)["asymmetry0.25"]
    base.calibration.asymmetry = 0.25
    job.quantize(base, str(tmp_path / "alone"))
    stream = (tmp_path / "alone/tokens.npy").stat().st_size - 128  # int32, for the shape
    stream = stream // 4 * 48 * 2 + 128
    assert dict(needs)["alone"] - cell == 5 * stream
