"""Sweeps on a tiny model: what cells share is made once, and every cell is as a run alone."""

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from documented import REPOSITORY, parsed

from gptvq_jax.config import flat, from_config, to_dict
from gptvq_jax.console import cli
from gptvq_jax.console.config_file import load_config
from gptvq_jax.files.disk_space import directory_bytes
from gptvq_jax.run import job
from gptvq_jax.run.evaluate import Evaluation
from gptvq_jax.run.float_moments import FloatMoments
from gptvq_jax.run.forward import Forward
from gptvq_jax.run.gradients import Backward
from gptvq_jax.run.overrides import ignored, settle
from gptvq_jax.run.quantize import Quantize
from gptvq_jax.run.workdir import WorkDir
from gptvq_jax.study.sweep import start
from gptvq_jax.study.sweep.axes import axis, points, sweep
from gptvq_jax.study.sweep.cells import resolve
from gptvq_jax.study.sweep.commands import command
from gptvq_jax.study.sweep.directory import Directory

BLOCKS = 3


@pytest.fixture
def base(tiny_config):
    """Nothing to solve, and both streams of the float model."""
    tiny_config.method, tiny_config.calibration.asymmetry = "rtn", 0.25
    return tiny_config


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Which takes as long as all else; and no measurement of this machine."""
    monkeypatch.setattr("gptvq_jax.console.layer_plot.plot", lambda *_: None)
    monkeypatch.setattr(start, "matmul_rate", lambda: 1e11)


def run(config, path, *given, cells=None):
    return start.sweep(config, "tiny.py", given, str(path), cells)


def rows(path):
    lines = (path / "results.jsonl").read_text().splitlines()
    return {row["cell"]: row for row in map(json.loads, lines)}


def manifest(path):
    return (path / "checkpoint/manifest.json").read_bytes()


@contextlib.contextmanager
def counted():
    """Counts the blocks that passes visit, and texts that are tokenized."""
    begun: Counter[str] = Counter()

    def counting(name, function):
        def count(*args, **kwargs):
            begun[name(args[0])] += 1
            return function(*args, **kwargs)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for visitor in (Forward, Backward, Quantize, FloatMoments):
            patch.setattr(visitor, "visit", counting(lambda v: type(v).__name__, visitor.visit))
        of_model = counting(lambda v: f"Evaluation {v.files.directory.name}", Evaluation.visit)
        patch.setattr(Evaluation, "visit", of_model)
        for text in ("calibration_tokens", "evaluation_tokens"):
            patch.setattr(job, text, counting(lambda _, text=text: text, getattr(job, text)))
        yield begun


def weighted(base):
    base.calibration.gradient_groups = 1
    return sweep("weighted", base, [axis("uniform.bits", (2, 3))])


def in_step(base):
    """Without gradients the float stream is made for all cells as well; one does not read it."""
    return sweep("in_step", base, [axis("calibration.asymmetry", (0.0, 0.25))])


def budgets(base):
    base.method, base.vq.seed = "gptvq", "mahalanobis"
    base.vq.group_size, base.vq.codebook_overhead = 0, 0.5
    base.allocation.bits, base.allocation.em_iterations = (0.5, 1.0), 1
    base.allocation.bits_per_value = 1.2
    return sweep("budgets", base, [axis("allocation.bits_per_value", (1.2, 1.4))])


def of_float_inputs(base):
    base.calibration.inputs, base.calibration.asymmetry = "float", 0.0
    base.true_sequential, base.calibration.gradient_groups = False, 1
    return sweep("of_float_inputs", base, [axis("uniform.bits", (2, 3))])


ONCE = {"Evaluation float": BLOCKS, "calibration_tokens": 1, "evaluation_tokens": 1}
EACH = {"Quantize": 2 * BLOCKS, "Evaluation quantized": 2 * BLOCKS}
UP_AND_DOWN = {"Forward": BLOCKS, "Backward": BLOCKS}
CASES = {
    weighted: {**ONCE, **EACH, **UP_AND_DOWN},
    in_step: {**ONCE, **EACH, "Forward": BLOCKS},
    budgets: {**ONCE, **EACH, **UP_AND_DOWN},
    of_float_inputs: {**ONCE, **EACH, **UP_AND_DOWN, "FloatMoments": BLOCKS},
}


SLOW = (budgets, in_step)


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


def test_a_budget_gives_way_to_an_axis_and_a_line_says_so():
    config = sweep("s", "smollm2_135m_2d:2b", [axis("vq.dim", (1, 2))])
    resolved = resolve(config)
    (note,) = resolved.notes
    assert note.startswith("allocation.bits_per_value=2.125 of the config file is off")
    assert note.endswith("all layers get what vq.dim says")
    budgets = {c.name: c.settings.allocation.bits_per_value for c in resolved.cells}
    assert budgets["dim1"] == 0


def test_some_cells_and_then_the_others(base, tmp_path):
    config = weighted(base)
    run(config, tmp_path, cells="2$")
    assert list(rows(tmp_path)) == ["bits2"]
    with counted() as visits:
        run(config, tmp_path)
    assert +visits == Counter({"Quantize": BLOCKS, "Evaluation quantized": BLOCKS})
    assert list(rows(tmp_path)) == ["bits2", "bits3"]


# --- processes


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


def test_a_claimed_cell_is_left_to_its_owner(base, tmp_path):
    """Until that is gone; then it is taken over."""
    config, slept = weighted(base), []
    directory = Directory(tmp_path / "sweep")
    owner = contextlib.ExitStack()

    def sleep(_):
        slept.append(set(rows(tmp_path / "sweep")))
        owner.close()  # it dies

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", sleep)
        patch.setattr(start.Drive.__init__, "__defaults__", (0.0, sleep))
        assert owner.enter_context(directory.claim("cell-bits2"))
        assert run(config, tmp_path / "sweep") == []
    assert slept == [{"bits3"}]
    assert set(rows(tmp_path / "sweep")) == {"bits2", "bits3"}


# --- what is refused


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: axis("vq.dimm", (1,)), r"axis 'dimm', .*config\.vq\.dimm is not a field; .*dim, "),
        (lambda: axis("vq.dim", ("two",)), r"config\.vq\.dim='two' must be of type int"),
        (lambda: axis("vq.dim", (1.5,)), r"config\.vq\.dim=1\.5 must be of type int"),
        (lambda: axis("vq", (1,)), r"config\.vq is a section; name one of its fields"),
        (lambda: axis("vq.dim.x", (1,)), r"config\.vq\.dim\.x is not a field"),
        (lambda: axis("vq.dim", ()), "axis 'dim' has no points"),
        (lambda: axis("vq.dim", (1, 1)), "two points of axis 'dim' are called 'dim1'"),
        (lambda: axis("vq.dim", (1, 2), names=("a",)), "2 values and 1 names"),
        (lambda: points("p", {"a/b": {"vq.dim": 1}}), "the name 'a/b' of a point"),
        (lambda: sweep("s", "nothing:2b", [axis("seed", (1,))]), "there is no config 'nothing'"),
        (lambda: sweep("s", "smollm2_135m_2d", []), "has no axes"),
        (
            lambda: sweep("s", "smollm2_135m_2d", [axis("seed", (1,)), axis("seed", (2,))]),
            "two axes of sweep 's' are called 'seed'",
        ),
        (
            lambda: sweep("s", "smollm2_135m_2d", [axis("seed", (1,))], cells={("x",): {}}),
            r"there is no cell \('x',\)",
        ),
    ],
)
def test_axes_that_cannot_be_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "change, given, message",
    [
        (
            {"axes": [axis("uniform.bits", (16,))]},
            (),
            "no cell of sweep .* can be; bits16: uniform",
        ),
        ({}, ("base.uniform.bits",), r"--config\.base\.uniform\.bits .* where 'bits' sets it"),
        ({}, ("name",), r"--config\.name is not to be set"),
        ({}, ("base.aqlm.beam",), r"--config\.base\.aqlm\.beam has no effect with method 'rtn'"),
        ({"axes": [axis("aqlm.beam", (1, 2))]}, (), "aqlm.beam of an axis has no effect with"),
        (
            {"axes": [axis("uniform.bits", (1, 2)), axis("uniform.bits", (1,), name="again")]},
            (),
            "axes 'bits' and 'again' both set uniform.bits",
        ),
        (
            {"kind": "layers", "axes": [axis("calibration.batch_size", (1, 2))]},
            (),
            "calibration.batch_size has no effect on layers by themselves",
        ),
    ],
)
def test_sweeps_that_cannot_be_are_refused_before_anything_runs(
    change, given, message, base, tmp_path
):
    config = sweep("s", base, change.pop("axes", [axis("uniform.bits", (2, 3))]), **change)
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path / "sweep", *given)
    assert not (tmp_path / "sweep").exists()


def test_cells_that_cannot_be_are_told_and_the_others_are_planned(base, tmp_path, capsys):
    budgets(base)
    base.calibration.num_windows = 5
    config = sweep(
        "some",
        base,
        [axis("allocation.bits_per_value", (0.3, 1.4), "budget"), axis("vq.block_size", (0, 128))],
    )
    start.plan(config, "tiny.py", (), str(tmp_path / "sweep"))
    out = capsys.readouterr().out
    assert "refused: budget0.3_block_size128: allocation.bits_per_value=0.3 cannot be met" in out
    assert "refused: budget1.4_block_size0: vq.block_size=0 must be at least 1" in out
    assert "sweep some: 1 cells, 0 finished" in out and "gradients-" in out
    assert "time  at least" in out and "GB of shared files" in out
    assert not (tmp_path / "sweep").exists()


def test_two_points_that_are_the_same_run_make_one(base, tmp_path, capsys):
    config = sweep(
        "same",
        base,
        [points("method", {"vq": {"method": "gptvq"}, "rtn": {}}), axis("uniform.bits", (2, 3))],
    )
    start.plan(config, "tiny.py", (), str(tmp_path))
    assert "refused: vq_bits3: it would be the same run as vq_bits2" in capsys.readouterr().out


def test_the_plan_goes_by_finished_cells(base, tmp_path, capsys):
    config = in_step(base)
    run(config, tmp_path, cells="asymmetry0$")
    capsys.readouterr()
    start.plan(config, "tiny.py", (), str(tmp_path))
    out = capsys.readouterr().out
    assert "2 cells, 1 finished" in out and "as 1 finished cells took" in out


def test_one_sweep_has_a_directory(base, tmp_path):
    run(in_step(base), tmp_path / "sweep", cells="asymmetry0$")
    message = r"is the directory of another sweep: .*name: 'in_step' -> 'weighted'.*--workdir"
    with pytest.raises(ValueError, match=message) as caught:
        run(weighted(base), tmp_path / "sweep")
    assert "\n" not in str(caught.value)
    base.calibration.gradient_groups = 0
    changed = in_step(base)
    changed.base.damping = 0.5
    with pytest.raises(ValueError, match=r"base\.damping: 0\.01 -> 0\.5"):
        run(changed, tmp_path / "sweep", "base.damping")
    with pytest.raises(ValueError, match="holds .* and no sweep.json.*pass another --workdir"):
        run(in_step(base), tmp_path / "sweep/cells/asymmetry0")
    (tmp_path / "sweep/sweep.json").write_text("{}")
    with pytest.raises(ValueError, match="sweep.json is not the record of a sweep"):
        run(in_step(base), tmp_path / "sweep")


def test_a_pattern_that_matches_nothing_names_the_cells(base, tmp_path):
    for pattern, message in (
        ("x", "--cells=x matches none .* bits2, bits3"),
        ("(", "no regular"),
    ):
        with pytest.raises(ValueError, match=message):
            run(weighted(base), tmp_path, cells=pattern)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_command_of_a_cell_is_that_run(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for name in ("sweeps/smollm2_dimensionality", "sweeps/llama2_7b_table2"):
        resolved = resolve(load_config(name))
        for cell in resolved.cells:
            line = command(resolved, cell, name)
            with parsed(line, monkeypatch) as script:
                settings = from_config(settle(script._CONFIG.value, cli.given_fields())[0])
            reasons = ignored(cell.settings)
            ours, theirs = (
                {k: v for k, v in flat(to_dict(s)).items() if k not in reasons}
                for s in (cell.settings, settings)
            )
            assert ours == theirs, line


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


def test_cells_of_the_papers_table_are_the_shipped_configs():
    resolved = resolve(load_config("sweeps/llama2_7b_table2"))
    assert len(resolved.cells) == 10 and not resolved.refused
    for cell in resolved.cells:
        assert cell.settings == from_config(load_config(cell.source))
    config = load_config("sweeps/llama2_7b_table2")
    config.base.model = "/models/mine"
    for cell in resolve(config, ["base.model"]).cells:
        assert cell.settings.model == "/models/mine"
        line = command(resolved, cell, "sweeps/llama2_7b_table2", ["base.model"])
        assert f"--config=configs/{cell.source.replace(':', '.py:')} " in line
        assert "--config.model=/models/mine --workdir=runs/llama2_7b_table2_" in line


def test_a_cell_without_a_config_of_its_own_is_named_in_its_sweep(base):
    resolved = resolve(sweep("s", base, [axis("damping", (0.01, 0.02))]))
    line = command(resolved, resolved.cells[1], "mine.py:x", ["base.model"])
    expected = f"--config=mine.py:x --config.base.model={base.model} '--cells=^damping0\\.02$'"
    assert line == f"python scripts/sweep.py {expected}"
