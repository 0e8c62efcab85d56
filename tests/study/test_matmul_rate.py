"""The rate of matrix products: the best one, in the time that there is."""

import pytest

from gptvq_jax.study.matmul_rate import best_rate, matmul_rate


class Machine:
    """Does 1 FLOP in 1 s; its first call of a product compiles for 9 s, the second is slow."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def product(self, shape):
        m, k, n = shape
        self.calls.append((shape, []))
        mine = self.calls[-1][1]

        def run():
            mine.append(2 * m * k * n * {0: 9, 1: 2}.get(len(mine), 1))
            self.now += mine[-1]

        return run


def test_the_best_of_the_shapes_that_fit():
    machine = Machine()
    shapes = [(1, 1, 1), (2, 2, 2), (9, 9, 9), (3, 2, 1)]
    assert best_rate(shapes, 400.0, machine.product, lambda: machine.now) == 1.0
    tried = {shape: calls for shape, calls in machine.calls}
    assert list(tried) == [(1, 1, 1), (2, 2, 2), (3, 2, 1)]  # 9 x 9 x 9 takes 1458 s
    measured = {shape: sum(calls[1:]) for shape, calls in tried.items()}
    assert measured[1, 1, 1] <= 100 and measured[2, 2, 2] <= 75
    assert 400 - 2 * 12 <= sum(measured.values()) <= 400


def test_a_machine_that_is_too_slow_still_has_a_rate():
    machine = Machine()
    rate = best_rate([(9, 9, 9), (99, 99, 99)], 1.0, machine.product, lambda: machine.now)
    assert rate == pytest.approx(0.5) and len(machine.calls) == 1


def test_this_machine():
    rate = matmul_rate([(64, 64, 64), (256, 256, 256)], 0.05)
    assert 1e7 < rate < 1e15
