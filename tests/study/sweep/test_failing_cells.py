"""Cells and passes that fail stop nobody, and are tried again."""

from tiny_sweeps import BLOCKS, counted, in_step, manifest, rows, run, weighted

from gptvq_jax.run import job


def test_a_failing_cell_is_recorded_stops_nobody_and_is_tried_again(base, tmp_path, monkeypatch):
    config = weighted(base)
    quantize = job.quantize

    def failing(config, *args, **kwargs):
        if config.uniform.bits == 2:
            raise ValueError("no such\nthing")
        return quantize(config, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(job, "quantize", failing)
        assert run(config, tmp_path) == ["bits2"]
    found = rows(tmp_path)
    assert (found["bits2"]["status"], found["bits2"]["error"]) == ("failed", "no such thing")
    assert found["bits3"]["status"] == "done"
    assert list(found["bits2"]["fields"].items()) == [("uniform.bits", 2)]
    before = manifest(tmp_path / "cells/bits3")
    with counted() as visits:
        assert run(config, tmp_path) == []
    assert visits["Quantize"] == BLOCKS and visits["Forward"] == visits["Backward"] == 0
    assert rows(tmp_path)["bits2"]["status"] == "done"
    assert manifest(tmp_path / "cells/bits3") == before


def test_a_bug_in_a_cell_leaves_its_traceback(base, tmp_path, monkeypatch):
    def failing(*_, **__):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(job, "quantize", failing)
    assert run(in_step(base), tmp_path) == ["asymmetry0", "asymmetry0.25"]
    error = rows(tmp_path)["asymmetry0"]["error"]
    assert error.startswith("ZeroDivisionError: by zero (all of it: ")
    assert "Traceback" in (tmp_path / "cells/asymmetry0/error.txt").read_text()


def test_a_pass_that_fails_is_tried_once_for_all_its_cells(base, tmp_path, monkeypatch):
    calls = []

    def failing(*_):
        calls.append(1)
        raise ValueError("an activation is not finite")

    with monkeypatch.context() as patch:
        patch.setattr("gptvq_jax.study.sweep.lending.find_gradients", failing)
        assert run(weighted(base), tmp_path) == ["bits2", "bits3"]
    assert calls == [1]
    assert {r["error"] for r in rows(tmp_path).values()} == {"an activation is not finite"}
    with counted() as visits:
        assert run(weighted(base), tmp_path) == []
    assert visits["Forward"] == 0 and visits["Backward"] == BLOCKS
