"""Bits of columns: against every allocation there is."""

import itertools

import numpy as np
import pytest

from gptvq_jax.moves.rates import distortion, water_fill


def loss(values, rates):
    return float(np.sum(values * distortion(np.asarray(rates))))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [0, 1, 7, 11.5, 16, 100])
def test_equal_costs_are_filled_exactly(seed, budget):
    values = np.random.default_rng(seed).lognormal(0, 2, 4)
    rates = water_fill(values, np.ones(4), budget, most=4)
    assert rates.sum() == min(int(budget), 16)
    every = (r for r in itertools.product(range(5), repeat=4) if sum(r) <= budget)
    assert loss(values, rates) == pytest.approx(min(loss(values, r) for r in every))


@pytest.mark.parametrize("seed", range(5))
def test_other_costs_are_within_the_last_bit_of_the_best(seed):
    rng = np.random.default_rng(seed)
    values, costs, budget = rng.lognormal(0, 2, 4), rng.integers(1, 5, 4), 20
    rates = water_fill(values, costs, budget, most=4)
    assert rates @ costs <= budget
    every = [r for r in itertools.product(range(5), repeat=4) if np.dot(r, costs) <= budget]
    assert loss(values, rates) <= 1.3 * min(loss(values, r) for r in every)
    # It is the best of all that cost no more than it does without what did not fit.
    drops = -np.diff(distortion(np.arange(5)))
    price = max(v * drops[r] / c for v, r, c in zip(values, rates, costs, strict=True) if r < 4)
    lagrangian = [loss(values, r) + price * np.dot(r, costs) for r in every]
    assert loss(values, rates) + price * (rates @ costs) <= min(lagrangian) + price * costs.max()


def test_a_column_without_worth_gets_bits_last():
    rates = water_fill(np.array([0.0, 1.0, 1e-9]), np.ones(3), 12)
    assert rates.tolist() == [0, 6, 6]


def test_nothing_to_fill():
    assert water_fill(np.zeros(0), np.zeros(0), 5).size == 0
