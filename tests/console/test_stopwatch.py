"""What a stage takes, of the process and of its threads."""

import json
import os
import threading

import jax
import jax.numpy as jnp
import pytest
from console_clock import BACKEND, TRACE, Clock

from gptvq_jax.console import stopwatch as module
from gptvq_jax.console.spans import Spans
from gptvq_jax.console.stopwatch import FIELDS, Stopwatch, stages_of, totals_of


@pytest.fixture
def clock(monkeypatch):
    """Of which the process uses 2 cores, reads 10 and writes 3 bytes a second."""
    clock = Clock()
    monkeypatch.setattr(
        module, "used", lambda: module._Used(2 * clock.now, int(10 * clock.now), 3 * clock.now)
    )
    return clock


def watch(clock):
    return Stopwatch(clock, clock.compiling)


def test_spans_join_and_share():
    spans, other = Spans(), Spans()
    for start, end in [(0, 1), (2, 3), (2.5, 4), (6, 7), (7, 8), (5.5, 9)]:
        spans.add(start, end)
    assert list(spans) == [(0, 1), (2, 4), (5.5, 9)] and spans.seconds == 6.5
    for start, end in [(0.5, 2.5), (3, 3.5), (8, 20)]:
        other.add(start, end)
    assert spans.shared(other) == other.shared(spans) == 0.5 + 0.5 + 0.5 + 1
    assert spans.shared(Spans()) == 0
    assert [spans.since(t) for t in (-1, 3, 5, 8.5, 9)] == [6.5, 4.5, 3.5, 0.5, 0]


def test_stages_add_up_to_the_run(clock):
    stopwatch = watch(clock)
    clock.work(1)
    for _ in range(2):
        with stopwatch.stage("a"):
            clock.work(2)
            clock.compile(1)
        with stopwatch.stage("b"):
            clock.work(4)
            stopwatch.flops(3e12)
    stopwatch.flops(5e12)
    clock.compile(0.5)
    summary = stopwatch.summary()
    rows = [
        ("a", 6, 12, 2, None, 60, 18),
        ("b", 8, 16, 0, 6.0, 80, 24),
        ("elsewhere", 1.5, 3, 0.5, 5.0, 15, 4.5),
    ]
    assert summary["stages"] == {name: dict(zip(FIELDS, row, strict=True)) for name, *row in rows}
    assert list(summary["stages"]) == ["a", "b", "elsewhere"]
    assert summary["totals"] == dict(zip(FIELDS, (15.5, 31, 2.5, 11.0, 155, 46.5), strict=True))
    assert (summary["seconds"], summary["compile_seconds"]) == (15.5, 2.5)
    assert json.loads(json.dumps(summary)) == summary


def test_a_trace_holds_the_traces_inside_it(clock):
    """JAX reports the inner ones first; their seconds count once."""
    stopwatch = watch(clock)
    with stopwatch.stage("a"):
        clock.compile(1, TRACE)
        clock.work(1)
        clock.compile(2, TRACE)
        clock.work(1)
        clock.compiling.on_event(TRACE, 5.0)
        clock.compile(3, BACKEND)
        clock.work(1)
        clock.compiling.on_event("/jax/another/duration", 9.0)
    assert stopwatch.summary()["stages"]["a"]["compile_seconds"] == 8


def test_threads_that_compile_at_once(clock):
    """Seconds in which any of them compiles; never more than there are."""
    stopwatch = watch(clock)
    with stopwatch.stage("a"):
        clock.work(10)
        for seconds in (9, 8, 10):  # three threads end here
            clock.compiling.on_event(BACKEND, seconds)
    with stopwatch.stage("b"):  # one that went on
        clock.work(2)
        clock.compiling.on_event(BACKEND, 11)
        clock.work(1)
    summary = stopwatch.summary()
    compiled = {name: row["compile_seconds"] for name, row in summary["stages"].items()}
    assert compiled == {"a": 10, "b": 2, "elsewhere": 0}
    assert summary["compile_seconds"] == 12


def test_stages_of_several_threads(clock):
    """a twice at once, b beside it: each counts its own seconds, and no second is elsewhere."""
    stopwatch = watch(clock)
    turns = {name: threading.Event() for name in ("in", "out")}
    entered = threading.Barrier(2)

    def other(name):
        with stopwatch.stage(name):
            stopwatch.flops(1e12)
            entered.wait(5)
            turns["out"].wait(5)
        entered.wait(5)

    for name in ("a", "b"):
        turns["out"].clear()
        thread = threading.Thread(target=other, args=[name])
        with stopwatch.stage("a"):
            clock.work(1)
            thread.start()
            entered.wait(5)
            stopwatch.flops(2e12)
            clock.work(2)
        clock.work(4)  # only the other
        turns["out"].set()
        entered.wait(5)
        thread.join()
    summary = stopwatch.summary()
    stages = summary["stages"]
    assert {name: row["seconds"] for name, row in stages.items()} == {"a": 10, "b": 6,
                                                                      "elsewhere": 0}  # fmt: skip
    assert summary["seconds"] == 14
    assert {name: row["tflop"] for name, row in stages.items()} == {"a": 5, "b": 1,
                                                                    "elsewhere": None}  # fmt: skip
    assert stages["a"]["cpu_seconds"] == 20 and stages["b"]["bytes_read"] == 60


def test_many_threads_lose_nothing():
    stopwatch = Stopwatch()

    def enter():
        for _ in range(50):
            with stopwatch.stage("a"):
                stopwatch.flops(1.0)

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    summary = stopwatch.summary()
    assert summary["stages"]["a"]["tflop"] == 400 / 1e12 == summary["totals"]["tflop"]
    assert 0 < summary["stages"]["a"]["seconds"] < summary["seconds"]


def test_a_stage_that_fails_is_left(clock):
    stopwatch = watch(clock)
    with pytest.raises(ValueError), stopwatch.stage("a"):
        clock.work(1)
        raise ValueError
    clock.work(1)
    stopwatch.flops(1.0)
    stages = stopwatch.summary()["stages"]
    assert stages["a"]["seconds"] == stages["elsewhere"]["seconds"] == 1
    assert stages["a"]["tflop"] is None and stages["elsewhere"]["tflop"] == 1e-12


def test_what_a_process_really_uses(tmp_path):
    stopwatch = Stopwatch()
    with stopwatch.stage("a"):
        jax.jit(lambda x: jnp.sin(x) * 5)(jnp.ones(5)).block_until_ready()
        (tmp_path / "file").write_bytes(bytes(10**6))
        (tmp_path / "file").read_bytes()
        while sum(os.times()[:2]) == 0 or stopwatch.total < 0.05:
            pass
    row = stopwatch.summary()["stages"]["a"]
    assert 0 < row["compile_seconds"] < row["seconds"]
    assert row["cpu_seconds"] > 0.02
    if module._IO.exists():
        assert 10**6 <= row["bytes_read"] < 10**8 and 10**6 <= row["bytes_written"] < 10**8


def test_without_the_counters_of_linux(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_IO", tmp_path / "none")
    stopwatch = Stopwatch()
    with stopwatch.stage("a"):
        pass
    summary = stopwatch.summary()
    for row in (*summary["stages"].values(), summary["totals"]):
        assert row["bytes_read"] is row["bytes_written"] is None and row["cpu_seconds"] >= 0


def test_summaries_of_older_code_have_seconds_alone():
    old = {"seconds": 5.0, "compile_seconds": 2.0, "stages": {"evaluate": 1.5}}
    nothing = dict.fromkeys(FIELDS)
    assert stages_of(old) == {"evaluate": nothing | {"seconds": 1.5}}
    assert totals_of(old) == nothing | {"seconds": 5.0, "compile_seconds": 2.0}


def test_summaries_of_this_code_are_read_as_written(clock):
    stopwatch = watch(clock)
    with stopwatch.stage("a"):
        clock.work(1)
    summary = stopwatch.summary()
    assert stages_of(summary) == summary["stages"]
    assert totals_of(summary) == summary["totals"]


def test_the_clock_of_compilation_hears_jax_once(monkeypatch):
    """JAX keeps its listeners for good."""
    name = "register_event_duration_secs_listener"
    monkeypatch.setattr(jax.monitoring, name, lambda _: pytest.fail("one more"))
    assert Stopwatch().summary()["compile_seconds"] == 0
