"""Blocks come in order, one ahead of the one in use, and what goes wrong comes with them."""

import gc
import threading
import time
import weakref

import jax.numpy as jnp
import pytest

from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.run.blocks import Blocks

SECONDS = 0.05  # that a block takes


class Source:
    """Blocks that hold their index; `bad` cannot be read."""

    def __init__(self, bad=None):
        self.bad, self.asked, self.threads, self.made = bad, [], [], []

    def block(self, index):
        self.asked.append(index)
        self.threads.append(threading.current_thread())
        time.sleep(SECONDS)
        if index == self.bad:
            raise KeyError(f"block {index} is damaged")
        array = jnp.full(3, index)
        self.made.append(weakref.ref(array))
        return {"x": array}

    @property
    def alive(self):
        return sum(array() is not None for array in self.made)


def no_thread_is_left():
    return not any(thread.name.startswith("load block") for thread in threading.enumerate())


@pytest.mark.parametrize("order", [range(4), range(3, -1, -1), [2], []])
def test_all_blocks_in_their_order(order):
    source, stopwatch = Source(), Stopwatch()
    found = [(index, int(block["x"][0])) for index, block in Blocks(source, order, stopwatch)]
    assert found == [(index, index) for index in order] and source.asked == list(order)
    assert threading.current_thread() not in source.threads and no_thread_is_left()


def test_one_block_is_read_ahead_and_no_more():
    source = Source()
    for number, _ in enumerate(Blocks(source, range(5), Stopwatch())):
        time.sleep(4 * SECONDS)
        assert source.asked == list(range(min(number + 2, 5)))
        gc.collect()
        assert source.alive <= 2


def test_only_waiting_counts():
    stopwatch = Stopwatch()
    for _ in Blocks(Source(), range(4), stopwatch):
        time.sleep(3 * SECONDS)
    assert SECONDS <= stopwatch.seconds["load block"] < 2 * SECONDS  # for the first alone


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_an_error_comes_as_it_is_when_it_is_the_turn_of_its_block(bad):
    source, seen = Source(bad), []
    with pytest.raises(KeyError, match=f"block {bad} is damaged"):
        for index, _ in Blocks(source, range(4), Stopwatch()):
            seen.append(index)
    assert seen == list(range(bad)) and no_thread_is_left()


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_thread_ends_with_an_iteration_that_is_left_early(error):
    source = Source()

    def leave():
        for _ in Blocks(source, range(4), Stopwatch()):
            if error is not None:
                raise error("enough")
            break

    if error is None:
        leave()
    else:
        with pytest.raises(error):
            leave()
    assert no_thread_is_left() and source.asked == [0, 1]
