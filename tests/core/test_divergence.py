"""What two models say of a token, against float64."""

import numpy as np
import pytest

from gptvq_jax.core.divergence import FIGURES, token_figures


def in_float64(logits, reference, targets):
    def log_softmax(x):
        x = np.asarray(x, np.float64)
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    log_q, log_p = log_softmax(logits), log_softmax(reference)
    picked = [np.take_along_axis(x, targets[..., None], -1)[..., 0] for x in (log_q, log_p)]
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    same = log_q.argmax(-1) == log_p.argmax(-1)
    return np.stack([-picked[0], -picked[1], kl, same], axis=-1)


def random_logits(spread, noise, vocab=5000, shape=(2, 7)):
    rng = np.random.default_rng(0)
    reference = rng.normal(0, spread, (*shape, vocab)) + rng.normal(0, 20, (*shape, 1))
    logits = reference + rng.normal(0, noise, reference.shape)
    targets = rng.integers(vocab, size=shape)
    return logits.astype(np.float32), reference.astype(np.float32), targets


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("noise", [1e-3, 0.1, 3.0, 60.0])
def test_equals_float64(spread, noise):
    """Of models that hardly differ, too: there p log(p/q) alone has lost its digits in float32."""
    logits, reference, targets = random_logits(spread, noise)
    found = np.asarray(token_figures(logits, reference, targets))
    expected = in_float64(logits, reference, targets)
    assert found.shape == (2, 7, len(FIGURES)) and found.dtype == np.float32
    np.testing.assert_allclose(found[..., :2], expected[..., :2], rtol=2e-6, atol=2e-5)
    rtol = 2e-3 if noise < 0.1 else 5e-5
    np.testing.assert_allclose(found[..., 2], expected[..., 2], rtol=rtol, atol=1e-13)
    np.testing.assert_array_equal(found[..., 3], expected[..., 3])


def test_a_model_does_not_differ_from_itself():
    logits, _, targets = random_logits(3.0, 0.0)
    figures = np.asarray(token_figures(logits, logits, targets))
    assert not figures[..., 2].any() and figures[..., 3].all()
    # Nor does a constant on all logits, which no probability depends on, but for rounding.
    shifted = np.asarray(token_figures(logits + np.float32(16), logits, targets))
    assert np.abs(shifted[..., 2]).max() < 1e-9


def test_two_tokens_by_hand():
    logits = np.log(np.float32([0.25, 0.75]))
    reference = np.log(np.float32([0.5, 0.5]))
    nll, of_reference, kl, same = np.asarray(token_figures(logits, reference, np.array(1)))
    expected = (-np.log(0.75), np.log(2), 0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75))
    assert (nll, of_reference, kl) == pytest.approx(expected, rel=1e-6)
    assert same == 0  # the first of equals


def test_certainties_that_contradict_each_other_are_finite():
    """Where a probability is no float32 number."""
    logits, reference = np.float32([0, 500, 0]), np.float32([500, 0, 0])
    figures = np.asarray(token_figures(logits, reference, np.array(0)))
    np.testing.assert_allclose(figures, [500, 0, 500, 0], rtol=1e-6)
    assert np.isnan(np.asarray(token_figures(logits * np.nan, reference, np.array(0)))[:3:2]).all()
