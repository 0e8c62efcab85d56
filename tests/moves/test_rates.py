"""Bits of columns, against every allocation there is; and the errors that they are chosen by."""

import itertools

import numpy as np
import pytest
from make_excess import best, excess

from gptvq_jax.core.trellis_table import MAX_BITS, MIN_BITS
from gptvq_jax.core.trellis_tensor import MAX_RATE
from gptvq_jax.moves.excess import MEASURED, distortion, spread
from gptvq_jax.moves.rates import price, water_fill

FOUR = distortion(4)


def loss(values, rates):
    return float(np.sum(values * FOUR[np.asarray(rates)]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [0, 1, 7, 11.5, 16, 100])
def test_equal_costs_are_filled_exactly(seed, budget):
    values = np.random.default_rng(seed).lognormal(0, 2, 4)
    rates = water_fill(values, np.ones(4), budget, FOUR)
    assert rates.sum() == min(int(budget), 16)
    every = (r for r in itertools.product(range(5), repeat=4) if sum(r) <= budget)
    assert loss(values, rates) == pytest.approx(min(loss(values, r) for r in every))


@pytest.mark.parametrize("seed", range(5))
def test_other_costs_are_within_the_last_bit_of_the_best(seed):
    rng = np.random.default_rng(seed)
    values, costs, budget = rng.lognormal(0, 2, 4), rng.integers(1, 5, 4), 20
    rates = water_fill(values, costs, budget, FOUR)
    assert rates @ costs <= budget
    every = [r for r in itertools.product(range(5), repeat=4) if np.dot(r, costs) <= budget]
    assert loss(values, rates) <= 1.3 * min(loss(values, r) for r in every)
    # It is the best of all that cost no more than it does without what did not fit.
    drops = -np.diff(FOUR)
    worth = max(v * drops[r] / c for v, r, c in zip(values, rates, costs, strict=True) if r < 4)
    lagrangian = [loss(values, r) + worth * np.dot(r, costs) for r in every]
    assert loss(values, rates) + worth * (rates @ costs) <= min(lagrangian) + worth * costs.max()
    assert price(values, costs, rates, FOUR) == pytest.approx(worth)


def test_a_column_without_worth_gets_bits_last():
    rates = water_fill(np.array([0.0, 1.0, 1e-9]), np.ones(3), 12, distortion(12))
    assert rates.tolist() == [0, 6, 6]


def test_nothing_to_fill():
    assert water_fill(np.zeros(0), np.zeros(0), 5, FOUR).size == 0


def test_the_price_is_what_the_next_bit_is_worth():
    values, costs = np.array([3.0, 1.0, 100.0]), np.array([2.0, 1.0, 1.0])
    rates = np.array([1, 0, 4])  # the last one is full
    expected = max(3 * (FOUR[1] - FOUR[2]) / 2, FOUR[0] - FOUR[1])
    assert price(values, costs, rates, FOUR) == pytest.approx(expected)
    assert price(values[2:], costs[2:], rates[2:], FOUR) == 0


def test_errors_are_measured_for_every_window_and_rate_and_fall_by_ever_less():
    assert list(MEASURED) == list(range(MIN_BITS, MAX_BITS + 1))
    for bits in MEASURED:
        errors = distortion(bits)
        assert len(errors) == min(MAX_RATE, bits) + 1 and errors[0] == 1
        assert len(spread(bits)) == MAX_RATE + 1
        drops = -np.diff(errors)
        assert np.all(drops > 0) and np.all(np.diff(drops) < 0)
        assert np.all(errors[1:] > 4.0 ** -np.arange(1, len(errors)))
        if bits > MIN_BITS:  # more memory is no worse
            shorter = distortion(bits - 1)
            assert np.all(errors[: len(shorter)] <= 1.01 * shorter)


@pytest.mark.parametrize(("bits", "rate"), [(4, 1), (6, 3), (8, 2), (9, 6)])
def test_errors_are_those_of_our_own_search(bits, rate):
    at, expected = MEASURED[bits][rate - 1]
    size = dict(streams=32, rows=128)
    assert excess(bits, rate, at, **size) == pytest.approx(expected, rel=0.04)
    # The spread is near the best: others are worse.
    least = min(excess(bits, rate, at * factor, **size) for factor in (0.8, 1.25))
    assert least > 1.02 * excess(bits, rate, at, **size)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "rate"), [(8, 4), (12, 2)])
def test_the_table_is_what_its_maker_prints(bits, rate):
    at, least = best(bits, rate, MEASURED[bits][rate - 1][0])
    assert at == pytest.approx(MEASURED[bits][rate - 1][0], abs=0.03)
    assert least == pytest.approx(MEASURED[bits][rate - 1][1], abs=0.011)
