"""Shares of several texts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptvq_jax.data.mixture import interleaved, shares


@given(st.integers(0, 300), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_shares_are_exact_to_one_window_and_sum_to_all(count, weights):
    parts = shares(count, weights)
    assert sum(parts) == count
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - count * weight / sum(weights)) < 1 + 1e-9


@pytest.mark.parametrize(
    "count, weights, expected",
    [(10, (3, 1, 1), [6, 2, 2]), (4, (1, 1, 1), [2, 1, 1]), (0, (1, 2), [0, 0]), (7, (1,), [7])],
)
def test_shares_by_hand(count, weights, expected):
    assert shares(count, weights) == expected


def test_parts_are_spread_evenly_in_their_own_order():
    parts = [np.arange(6), np.arange(10, 13), np.empty(0, int)]
    mixed = interleaved(parts).tolist()
    assert [x for x in mixed if x < 10] == list(range(6)) and sorted(mixed)[6:] == [10, 11, 12]
    for third in (mixed[:3], mixed[3:6], mixed[6:]):
        assert sum(x >= 10 for x in third) == 1
    np.testing.assert_array_equal(interleaved([np.arange(5)]), np.arange(5))
