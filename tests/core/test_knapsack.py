"""The knapsack against all combinations, and against a bound where those are too many."""

import itertools

import numpy as np
import pytest

from gptvq_jax.core.knapsack import choose


def total(values, chosen):
    return sum(of_item[k] for of_item, k in zip(values, chosen, strict=True))


def brute_force(losses, sizes, budget):
    """The least loss of all combinations within the budget."""
    combinations = itertools.product(*(range(len(of_item)) for of_item in losses))
    return min(total(losses, c) for c in combinations if total(sizes, c) <= budget)


def check(losses, sizes, budget):
    chosen = choose(losses, sizes, budget)
    assert total(sizes, chosen) <= budget
    expected = brute_force(losses, sizes, budget)
    assert total(losses, chosen) == pytest.approx(expected, rel=1e-12, abs=0), (sizes, budget)


def small(rng):
    """Small integers: ties, losses of 0, choices that nobody needs."""
    count = rng.integers(1, 6)
    return rng.integers(0, 4, count) * 1.0, rng.integers(1, 6, count)


def wide(rng):
    """Losses of very different size, next to sizes of any kind."""
    count = rng.integers(1, 6)
    return 10.0 ** rng.uniform(-10, 0, count), rng.integers(1, 10**9, count)


def curve(rng):
    """What is measured on a layer: the loss falls about fourfold with a bit."""
    bits = np.sort(rng.uniform(1, 4, rng.integers(1, 6)))
    noise = rng.uniform(0.8, 1.2, len(bits))
    return 10.0 ** rng.uniform(-4, 1) * 4.0**-bits * noise, (bits * 10**7).astype(int)


def equal_sizes(rng):
    count = rng.integers(1, 6)
    return rng.random(count), np.full(count, 7)


@pytest.mark.parametrize("make", [small, wide, curve, equal_sizes])
def test_equals_the_best_of_all_combinations(make):
    for seed in range(150):
        rng = np.random.default_rng(seed)
        items = [make(rng) for _ in range(rng.integers(1, 6))]
        losses, sizes = ([part.tolist() for part in parts] for parts in zip(*items, strict=True))
        smallest, largest = sum(map(min, sizes)), sum(map(max, sizes))
        exact = sum(int(rng.choice(of_item)) for of_item in sizes)  # met to the byte
        for budget in (smallest, exact, max(exact - 1, smallest), largest, 2 * largest):
            check(losses, sizes, budget)


def test_by_hand():
    # 1 byte moved from the first item to the second costs 1 and saves 5.
    losses, sizes = [[4.0, 3.0], [9.0, 4.0]], [[1, 2], [1, 2]]
    assert choose(losses, sizes, 3) == [0, 1]
    assert choose(losses, sizes, 4) == [1, 1]
    assert choose(losses, sizes, 2) == [0, 0]
    # The best two choices do not fit together; neither is the best one per byte.
    assert choose([[10.0, 0.0], [9.0, 0.0], [8.0, 0.0]], [[0, 6], [0, 5], [0, 5]], 10) == [0, 1, 1]


def test_one_item_takes_the_best_that_fits():
    assert [choose([[3.0, 2.0, 1.0]], [[10, 20, 30]], b) for b in (10, 29, 30)] == [[0], [1], [2]]


def test_losses_of_zero_take_any_choice_that_fits():
    assert total([[5, 9], [5, 9]], choose([[0.0, 0.0]] * 2, [[5, 9]] * 2, 10)) == 10


def test_a_budget_below_the_smallest_choices_is_an_error():
    with pytest.raises(ValueError, match="smallest choices take 12 bytes, the budget is 11"):
        choose([[1.0, 0.0], [1.0, 0.0]], [[5, 9], [7, 9]], 11)


def model(seed):
    """80 blocks of 7 layers, 10 choices each, as large as those of a 70B model."""
    rng = np.random.default_rng(seed)
    bits = np.arange(1, 6, 0.5) + 0.125
    losses, sizes = [], []
    for num_values in [8192 * 8192] * 160 + [1024 * 8192] * 160 + [8192 * 28672] * 240:
        noise = rng.uniform(0.9, 1.1, len(bits))
        losses.append((10.0 ** rng.uniform(-3, 1) * 4.0**-bits * noise).tolist())
        sizes.append((bits * num_values / 8 * rng.uniform(0.99, 1.01, 10)).astype(int).tolist())
    return losses, sizes


def lower_bound(losses, sizes, budget):
    """max over a price of sum_i min_k (loss + price * size) - price * budget, which is concave."""
    losses, sizes = np.array(losses), np.array(sizes)

    def value(price):
        return np.sum(np.min(losses + price * sizes, axis=1)) - price * budget

    low, high = 0.0, float(np.max(losses))
    for _ in range(200):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (a, high) if value(a) < value(b) else (low, b)
    return value(low)


@pytest.mark.parametrize("seed", range(3))
def test_a_whole_model_is_within_one_step_of_the_bound(seed):
    losses, sizes = model(seed)
    smallest, largest = sum(map(min, sizes)), sum(map(max, sizes))
    budget = smallest + (largest - smallest) // (2 + seed)
    chosen = choose(losses, sizes, budget)
    assert total(sizes, chosen) <= budget
    gap = total(losses, chosen) - lower_bound(losses, sizes, budget)
    steps = [of_item[k - 1] - of_item[k] for of_item, k in zip(losses, chosen, strict=True) if k]
    assert -1e-9 * total(losses, chosen) <= gap < np.median(steps)


def test_one_byte_less_never_gives_less_loss():
    """Budgets just below what the best allocation takes: no tolerance of any kind may help out."""
    losses, sizes = model(0)
    losses, sizes = losses[::40], sizes[::40]
    budget, before = sum(map(max, sizes)) * 2 // 3, 0.0
    for _ in range(20):
        chosen = choose(losses, sizes, budget)
        assert total(sizes, chosen) <= budget
        assert total(losses, chosen) >= before
        budget, before = total(sizes, chosen) - 1, total(losses, chosen)
