"""Standard errors over windows: exact cases, a bootstrap in a loop, and what they should be."""

import numpy as np
import pytest

from gptvq_jax.core import standard_error
from gptvq_jax.core.standard_error import of_mean, of_quantiles


def dependent(windows, tokens, seed=0):
    """Tokens of a window share half of their variance."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(windows, 1)) + rng.normal(size=(windows, tokens))
    return values.astype(np.float32)


def test_windows_are_the_samples():
    values = np.float32([[1, 3], [5, 7]])  # means 2 and 6
    assert of_mean(values) == pytest.approx(np.sqrt(8) / np.sqrt(2))
    assert of_mean(np.repeat(values, 10, axis=1)) == of_mean(values)


def test_one_window_has_no_error_and_what_is_not_finite_has_none_that_is():
    assert of_mean(np.ones((1, 5))) is None and of_quantiles(np.ones((1, 5)), [0.5]) == [None]
    for bad in (np.inf, np.nan):
        values = np.float32([[1, 2], [3, bad]])
        assert np.isnan(of_mean(values)) and np.isnan(of_quantiles(values, [0.5, 0.9])).all()


def test_quantiles_are_those_of_a_bootstrap(monkeypatch):
    monkeypatch.setattr(standard_error, "_RESAMPLES", 50)
    values, levels = dependent(6, 9), [0.0, 0.1, 0.5, 0.99, 1.0]
    draws = np.random.default_rng(0).multinomial(6, [1 / 6] * 6, 50)
    samples = [np.repeat(values, times, axis=0) for times in draws]
    found = [np.quantile(sample, levels, method="inverted_cdf") for sample in samples]
    expected = np.std(np.asarray(found, np.float64), axis=0, ddof=1)
    np.testing.assert_allclose(of_quantiles(values, levels), expected, rtol=1e-9)
    assert of_quantiles(values, levels) == of_quantiles(values.copy(), levels)


def test_they_are_the_spread_of_what_other_windows_would_have_given():
    """Not that of independent tokens, which is smaller."""
    samples = [dependent(40, 25, seed) for seed in range(200)]
    means, medians = ([f(sample) for sample in samples] for f in (np.mean, np.median))
    of_means = np.mean([of_mean(sample) for sample in samples])
    of_medians = np.mean([of_quantiles(sample, [0.5])[0] for sample in samples[:20]])
    assert of_means == pytest.approx(np.std(means), rel=0.15)
    assert of_medians == pytest.approx(np.std(medians), rel=0.25)
    assert of_means > 2 * np.std(samples[0]) / np.sqrt(samples[0].size)
