"""Drawing the next token: properties of the cuts, and the odds of what is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptvq_jax.core.seeds import random_key
from gptvq_jax.serve.sampling import Sampling, in_top_p, sample, sample_each


def random_logits(seed, batch=3, vocab=50, spread=3.0):
    logits = np.random.default_rng(seed).normal(scale=spread, size=(batch, vocab))
    return jnp.asarray(logits, jnp.float32)


def draws(logits, sampling, count=400):
    """Tokens (count, batch)."""
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: sample(logits, key, sampling)))(keys))


def test_temperature_0_is_argmax_whatever_the_cuts():
    logits = random_logits(0)
    for sampling in (Sampling(), Sampling(0.0, top_k=3, top_p=0.5)):
        tokens = sample(logits, jax.random.key(1), sampling)
        assert tokens.dtype == jnp.int32
        np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))


def test_a_tiny_temperature_is_greedy_and_finite():
    logits = random_logits(1) * 1000
    tokens = draws(logits, Sampling(temperature=1e-30), count=20)
    np.testing.assert_array_equal(tokens, np.broadcast_to(np.argmax(logits, -1), tokens.shape))


@pytest.mark.parametrize("top_k", [1, 4, 50, 1000])
def test_top_k_draws_each_of_the_k_likeliest_and_no_other(top_k):
    logits = random_logits(2, spread=0.1)
    tokens = draws(logits, Sampling(temperature=1.0, top_k=top_k), count=1000)
    for index, row in enumerate(np.asarray(logits)):
        assert set(tokens[:, index]) == set(np.argsort(row)[-top_k:])


def test_top_k_keeps_k_of_equal_logits():
    tokens = draws(jnp.zeros((1, 20)), Sampling(temperature=1.0, top_k=3))
    assert len(set(tokens[:, 0])) == 3


@given(
    seed=st.integers(0, 1000),
    top_p=st.floats(0.01, 1.0, exclude_max=True),
    spread=st.floats(0.01, 10),
)
@settings(deadline=None, max_examples=60)
def test_top_p_keeps_the_smallest_set_with_that_mass(seed, top_p, spread):
    probabilities = np.asarray(jax.nn.softmax(random_logits(seed, spread=spread)))
    kept = np.asarray(jax.jit(in_top_p)(probabilities, top_p))
    for row, keep in zip(probabilities.astype(np.float64), kept, strict=True):
        ordered = np.sort(row)[::-1]
        before = np.concatenate([[0.0], np.cumsum(ordered)[:-1]])
        # All whose betters do not have the mass yet; float32 may decide otherwise near it.
        fewest, most = (np.sum(before < top_p + margin) for margin in (-1e-6, 1e-6))
        assert fewest <= keep.sum() <= most
        np.testing.assert_array_equal(np.sort(row[keep])[::-1], ordered[: keep.sum()])


def test_top_p_by_hand():
    probabilities = jnp.array([[0.1, 0.5, 0.25, 0.15], [0.25, 0.25, 0.25, 0.25]])
    for top_p, first in [(0.3, [1]), (0.5, [1]), (0.6, [1, 2]), (0.9, [1, 2, 3]), (1.0, range(4))]:
        kept = np.asarray(in_top_p(probabilities, top_p))
        np.testing.assert_array_equal(np.flatnonzero(kept[0]), first)
        assert kept[1].all()  # equals go in together


def test_top_p_is_of_what_top_k_left():
    # Of all, the first two have 0.6; of the first three, 0.75.
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.2]])) + jnp.array([[0, 0.01, 0.0, -0.01]])
    assert set(draws(logits, Sampling(1.0, top_k=0, top_p=0.7))[:, 0]) == {0, 1, 2}
    assert set(draws(logits, Sampling(1.0, top_k=3, top_p=0.7))[:, 0]) == {0, 1}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_odds_follow_the_temperature(temperature):
    logits = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))
    expected = np.asarray(jax.nn.softmax(logits[0] / temperature))
    tokens = draws(logits, Sampling(temperature), count=20_000)[:, 0]
    found = np.bincount(tokens, minlength=3) / len(tokens)
    np.testing.assert_allclose(found, expected, atol=0.015)  # 4 standard deviations


def test_equal_keys_draw_equal_tokens_and_others_do_not():
    logits, sampling = random_logits(4, batch=30, spread=0.1), Sampling(temperature=1.0)
    first = sample(logits, jax.random.key(0), sampling)
    np.testing.assert_array_equal(first, sample(logits, jax.random.key(0), sampling))
    assert (first != sample(logits, jax.random.key(1), sampling)).any()


@pytest.mark.parametrize(
    "fields, name",
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_fields_out_of_range_raise(fields, name):
    with pytest.raises(ValueError, match=f"{name}=.* must be"):
        Sampling(**fields)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 10**30])
def test_a_seed_that_would_be_taken_for_another_is_refused(seed):
    with pytest.raises(ValueError, match=rf"seed={seed} must be from 0 to 4294967295"):
        random_key(seed)


def test_the_largest_seed_is_one_of_its_own():
    keys = {str(jax.random.key_data(random_key(seed))) for seed in (0, 1, 2**31, 2**32 - 1)}
    assert len(keys) == 4


EACH = [
    Sampling(),
    Sampling(0.7),
    Sampling(3.0, 0, 0.6),
    Sampling(1e-30, 0, 1.0),
    Sampling(1.0, 0, 1e-6),
]


def settings_of(rows):
    fields = ("temperature", np.float32), ("top_k", np.int32), ("top_p", np.float32)
    return [np.array([getattr(row, name) for row in rows], kind) for name, kind in fields]


def test_each_sequence_draws_what_it_draws_alone():
    logits, keys = random_logits(3, len(EACH)), jax.random.split(jax.random.key(5), len(EACH))
    each, one = jax.jit(sample_each), jax.jit(sample, static_argnums=2)
    for _ in range(10):
        keys = jax.vmap(lambda key: jax.random.split(key)[0])(keys)
        found = each(logits, keys, *settings_of(EACH))
        assert found.dtype == jnp.int32
        alone = [one(logits[i : i + 1], keys[i], s)[0] for i, s in enumerate(EACH)]
        np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize("top_k", [1, 4, 50, 1000])
def test_each_sequence_draws_from_its_own_likeliest(top_k):
    logits = random_logits(2, spread=0.1)
    rows = [Sampling(1.0, top_k), Sampling(1.0), Sampling(1.0, top_k, 0.5)]
    each = jax.jit(jax.vmap(lambda keys: sample_each(logits, keys, *settings_of(rows))))
    tokens = np.asarray(each(jax.random.split(jax.random.key(0), (1000, 3))))
    likeliest = np.argsort(np.asarray(logits))[:, -top_k:]
    assert set(tokens[:, 0]) == set(likeliest[0]) and len(set(tokens[:, 1])) == 50
    assert set(tokens[:, 2]) <= set(likeliest[2])
    assert len(set(tokens[:, 2])) <= max(1, len(likeliest[2]) // 2 + 1)
