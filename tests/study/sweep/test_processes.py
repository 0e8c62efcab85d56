"""Sweeps that are stopped, go on, or are made by several processes."""

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from tiny_sweeps import BLOCKS, CASES, counted, manifest, rows, run, weighted

from gptvq_jax.study.sweep import start
from gptvq_jax.study.sweep.axes import axis, sweep
from gptvq_jax.study.sweep.directory import Directory


def test_some_cells_and_then_the_others(base, tmp_path):
    config = weighted(base)
    run(config, tmp_path, cells="2$")
    assert list(rows(tmp_path)) == ["bits2"]
    with counted() as visits:
        run(config, tmp_path)
    assert +visits == Counter({"Quantize": BLOCKS, "Evaluation quantized": BLOCKS})
    assert list(rows(tmp_path)) == ["bits2", "bits3"]


class Killed(BaseException):
    """What ends a process here: nothing after it is done."""


@pytest.mark.slow
def test_killed_at_any_change_of_a_file_name_it_goes_on(base, tmp_path):
    """At every fifth: no block of a pass that was finished is visited again."""
    config = weighted(base)
    run(config, tmp_path / "whole")
    expected = {n: manifest(tmp_path / "whole/cells" / n) for n in rows(tmp_path / "whole")}
    number, path = 3, tmp_path / "killed"
    finished = False
    visited: Counter[str] = Counter()
    while not finished:
        made, replace = 0, os.replace

        def dying(old, new, limit=number, replace=replace):
            nonlocal made
            if str(new).startswith(str(path)):
                made += 1
                if made > limit:
                    raise Killed
            return replace(old, new)

        with pytest.MonkeyPatch.context() as patch, counted() as visits:
            patch.setattr(os, "replace", dying)
            try:
                assert run(config, path) == []
                finished = True
            except Killed:
                number += 2
        visited += visits
    assert number > 8
    assert {n: manifest(path / "cells" / n) for n in rows(path)} == expected
    # A visit that was killed is made again, and nothing else.
    kills = (number - 3) // 2
    assert sum(visited.values()) <= sum(CASES[weighted].values()) + 2 * kills


def in_process(config, path, log):
    """What other processes do."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with pytest.MonkeyPatch.context() as patch, counted() as visits:
        patch.setattr("gptvq_jax.console.layer_plot.plot", lambda *_: None)
        try:
            run(config, path)
        finally:
            Path(f"{log}.visits").write_text(json.dumps(visits))


def started(config, path, log):
    process = multiprocessing.get_context("spawn").Process(
        target=in_process, args=(config, path, log)
    )
    process.start()
    return process


@pytest.mark.slow
def test_two_processes_share_the_work_and_a_dead_one_is_taken_over(base, tmp_path):
    base.calibration.gradient_groups = 1
    config = sweep("many", base, [axis("uniform.bits", (2, 3)), axis("damping", (0.01, 0.02))])
    dying = started(config, tmp_path / "sweep", tmp_path / "dying")
    while not list((tmp_path / "sweep").glob("shared/float-*/tokens.npy")):
        assert dying.is_alive()
        time.sleep(0.01)
    others = [started(config, tmp_path / "sweep", tmp_path / name) for name in "ab"]
    time.sleep(1)
    os.kill(dying.pid, signal.SIGKILL)
    for process in others:
        process.join()
        assert process.exitcode == 0
    visits = Counter()
    for name in "ab":
        visits += Counter(json.loads((tmp_path / f"{name}.visits").read_text()))
    found = rows(tmp_path / "sweep")
    assert [row["status"] for row in found.values()] == ["done"] * 4
    assert visits["Quantize"] <= 4 * BLOCKS and visits["Backward"] <= BLOCKS


def test_a_claimed_cell_is_left_to_its_owner(base, tmp_path, capsys):
    """Until that is gone; then it is taken over."""
    config, slept = weighted(base), []
    directory = Directory(tmp_path / "sweep")
    owner = contextlib.ExitStack()

    def sleep(_):
        slept.append(set(rows(tmp_path / "sweep")))
        owner.close()  # it dies

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", sleep)
        patch.setattr(start.Drive.__init__, "__defaults__", (None, 0.0, sleep))
        assert owner.enter_context(directory.claim("cell-bits2"))
        assert run(config, tmp_path / "sweep") == []
    assert slept == [{"bits3"}]
    waiting = [t for t in capsys.readouterr().err.split("\r") if "waiting for other" in t]
    assert waiting and all("ETA ?," in text for text in waiting)
    assert set(rows(tmp_path / "sweep")) == {"bits2", "bits3"}
