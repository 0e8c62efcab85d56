"""The bar's ETA is that of the work to come, by a clock that stands still."""

import time

import jax
import jax.numpy as jnp
import pytest
from console_clock import Clock

from gptvq_jax.console import compile_time
from gptvq_jax.console.progress import Progress


def bar(clock, total=210, **options):
    return Progress(total, "quantize", "layer", **options, clock=clock, compiling=clock.compiling)


def shown(capsys):
    return capsys.readouterr().err.split("\r")[-1]


def test_compilation_is_not_what_the_steps_to_come_take(capsys):
    clock = Clock()
    with bar(clock) as progress:
        assert "0/210 layers [00:00, ETA ?]" in shown(capsys)
        clock.compile(10)
        progress.note("block 0 Hessians")
        assert "ETA ?, block 0 Hessians]" in shown(capsys)
        clock.work(1)
        progress.advance("block 0 q_proj")
        assert progress.seconds_left == pytest.approx(209)
        progress.note("next")
        assert "1/210 layers [00:00, ETA 03:29, next]" in shown(capsys)
        for step in range(2, 210):
            clock.compile(3 if step == 100 else 0)
            clock.work(1)
            progress.advance()
            assert progress.seconds_left == pytest.approx(210 - step)


def test_steps_of_an_earlier_run_do_not_count(capsys):
    clock = Clock()
    with bar(clock) as progress:
        clock.work(50)  # what a resumed run does first
        progress.skip(180)
        assert "180/210 layers [00:00, ETA ?]" in shown(capsys)
        for step in range(1, 10):
            clock.work(2)
            progress.advance()
            assert progress.seconds_left == pytest.approx(2 * (30 - step))
        progress.skip(1)  # later ones lie between steps
        assert progress.seconds_left == pytest.approx(2 * (20))
    assert "190/210 layers" in shown(capsys)


def test_a_large_layer_is_more_work(capsys):
    """k_proj costs 1, gate_proj 8, and 1e15 a unit that no sum of floats is exact in."""
    unit, seconds = 1e15 / 3, 0.25
    costs = [1, 1, 8, 8] * 20
    clock = Clock()
    with bar(clock, len(costs), work=sum(costs) * unit) as progress:
        progress.skip(4, sum(costs[:4]) * unit)
        for i, cost in enumerate(costs[4:], 5):
            clock.work(cost * seconds)
            progress.advance(work=cost * unit)
            assert progress.seconds_left == pytest.approx(sum(costs[i:]) * seconds, abs=1e-6)
    assert "100%|██████████| 80/80 layers [00:00, ETA 00:00]" in shown(capsys)


def test_a_step_that_was_all_compilation_tells_nothing(capsys):
    clock = Clock()
    with bar(clock, 10) as progress:
        clock.compile(10)
        progress.advance()
        assert progress.seconds_left is None
        assert "1/10 layers [00:00, ETA ?]" in (progress.note(""), shown(capsys))[1]
        clock.work(2)
        progress.advance()
        assert progress.seconds_left == pytest.approx(8 * 1)


def test_steps_without_work_and_parts_of_steps():
    clock = Clock()
    with bar(clock, 4, work=2.5) as progress:
        progress.advance(steps=2, work=0.0)  # quick ones, such as blocks that stay dense
        assert progress.seconds_left is None
        clock.work(3)
        progress.advance(steps=0.5, work=1.0)
        assert progress.seconds_left == pytest.approx(4.5)
    with bar(clock, 0) as progress:
        progress.skip(0)
    with bar(clock, 2, work=0.0) as progress:
        progress.advance(work=0.0)
        assert progress.seconds_left is None


def test_what_is_expected_is_the_eta_until_a_step_is_done(capsys):
    clock = Clock()
    with bar(clock, 4, work=8.0) as progress:
        progress.skip(1, 2.0)
        progress.expect(600, at_least=True)
        assert progress.seconds_left == pytest.approx(600)
        assert "1/4 layers [00:00, ETA at least 10:00]" in shown(capsys)
        clock.work(60)
        progress.note("first")
        assert "ETA at least 09:00, first]" in shown(capsys)
        progress.skip(1, 2.0)  # another process has done it
        assert progress.seconds_left == pytest.approx(400)
        clock.work(500)
        progress.note("longer than that")
        assert progress.seconds_left is None and "ETA ?, longer" in shown(capsys)
        progress.advance(work=2.0)
        assert progress.seconds_left == pytest.approx(500)
        assert "3/4 layers [00:00, ETA 08:20" in (progress.note(""), shown(capsys))[1]
    with bar(clock, 0) as progress:
        progress.expect(1.0)  # nothing is left
        assert progress.seconds_left in (None, 0.0)


def test_while_others_are_waited_for_nothing_is_known_and_no_time_counts(capsys):
    clock = Clock()
    with bar(clock, 4) as progress:
        progress.expect(40)
        clock.work(10)
        progress.advance()
        assert progress.seconds_left == pytest.approx(30)
        for _ in range(3):
            progress.wait("waiting")
            assert progress.seconds_left is None and "ETA ?, waiting]" in shown(capsys)
            clock.work(1000)
        progress.skip(1)
        assert progress.seconds_left is None  # still waiting
        progress.note("mine")
        clock.work(10)
        progress.advance()
        assert progress.seconds_left == pytest.approx(10)


@pytest.mark.parametrize("whole, part", [(None, 2.0), (9.0, None)])
def test_work_of_all_and_of_each(whole, part):
    with bar(Clock(), 4, work=whole) as progress:
        for count in (progress.skip, progress.advance):
            with pytest.raises(ValueError, match="give the work of all steps and of each step"):
                count(steps=1, work=part)


def test_what_jax_compiles_is_left_out():
    before = compile_time.PROCESS.since(0)
    with Progress(3, "test", "step") as progress:
        start = time.perf_counter()
        jax.jit(lambda x: jnp.cos(x) + 3)(jnp.ones(7)).block_until_ready()
        compiled = compile_time.PROCESS.since(start)
        assert 0 < compiled < time.perf_counter() - start
        time.sleep(0.05 + compiled / 20)
        progress.advance()
        assert 0.1 <= progress.seconds_left < 2 * (time.perf_counter() - start - compiled) + 1e-3
    assert compile_time.PROCESS.since(0) > before
