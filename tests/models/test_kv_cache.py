"""Steps with a cache against the forward pass over the whole sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import CONFIGS, random_params

from gptvq_jax.models import llama
from gptvq_jax.models.kv_cache import LayerCache

BATCH, TIME, MAX_LEN = 3, 40, 48
LENGTHS = np.array([5, 33, 20], np.int32)  # of the prompts; the sliding window is 16


def embedded(config, seed=0):
    x = np.random.RandomState(seed).standard_normal((BATCH, TIME, config.hidden_size))
    return jnp.asarray(x, jnp.float32)


def full(config, params, x):
    for i in range(config.num_hidden_layers):
        x = llama.block_forward(config, params[f"layers_{i}"], x)
    return np.asarray(llama.head_logits(config, params, x))


def cached(config, params, x, caches, positions=None):
    """Logits, and the caches after x."""
    updated = []
    for i, cache in enumerate(caches):
        x, cache = llama.block_step(config, params[f"layers_{i}"], x, cache, positions)
        updated.append(cache)
    return np.asarray(llama.head_logits(config, params, x)), updated


def empty(config, dtype="float32"):
    return [LayerCache.zeros(config, BATCH, MAX_LEN, dtype)] * config.num_hidden_layers


@pytest.mark.parametrize("name", sorted(CONFIGS))  # grouped heads, a sliding window, tied, untied
def test_prompts_of_any_length_then_steps_equal_the_full_forward(name):
    config = CONFIGS[name]
    params, x = random_params(config, seed=1), embedded(config)
    expected = full(config, params, x)
    # Right of a prompt there is padding: other vectors, which nothing may see.
    padded = jnp.where(np.arange(TIME)[:, None] < LENGTHS[:, None, None], x, 100.0)
    logits, caches = cached(config, params, padded, empty(config))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], atol=1e-4)
    positions = LENGTHS.copy()
    while positions.max() < TIME:
        step = jnp.take_along_axis(x, positions[:, None, None], axis=1)
        logits, caches = cached(config, params, step, caches, jnp.asarray(positions[:, None]))
        wanted = np.take_along_axis(expected, positions[:, None, None], axis=1)
        np.testing.assert_allclose(logits, wanted, atol=1e-4)
        positions += 1


@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_every_position_from_an_empty_cache(window):
    config = dataclasses.replace(CONFIGS["mistral"], sliding_window=window)
    params, x = random_params(config, seed=2), embedded(config)
    expected, caches = full(config, params, x), empty(config)
    for t in range(12):
        positions = jnp.full((BATCH, 1), t)
        logits, caches = cached(config, params, x[:, t : t + 1], caches, positions)
        np.testing.assert_allclose(logits, expected[:, t : t + 1], atol=1e-4)


def test_several_tokens_may_follow_at_once():
    config = CONFIGS["mistral"]
    params, x = random_params(config, seed=3), embedded(config)
    expected = full(config, params, x)
    _, caches = cached(config, params, x[:, :20], empty(config))
    positions = jnp.broadcast_to(jnp.arange(20, TIME), (BATCH, TIME - 20))
    logits, _ = cached(config, params, x[:, 20:], caches, positions)
    np.testing.assert_allclose(logits, expected[:, 20:], atol=1e-4)


def test_a_cache_keeps_its_dtype_and_follows_the_activations():
    config = CONFIGS["llama3"]
    block, x = random_params(config, seed=4)["layers_0"], embedded(config)
    exact = np.asarray(llama.block_forward(config, block, x))
    cache, x = empty(config, "bfloat16")[0], x.astype(jnp.bfloat16)
    _, cache = llama.block_step(config, block, x[:, :-1], cache)
    y, cache = llama.block_step(config, block, x[:, -1:], cache, jnp.full((BATCH, 1), TIME - 1))
    assert y.dtype == cache.k.dtype == cache.v.dtype == jnp.bfloat16
    error = np.asarray(y, np.float32) - exact[:, -1:]
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(exact[:, -1:])


def test_a_layer_keeps_batch_x_heads_x_slots_x_head_dim():
    config = CONFIGS["llama3"]
    shapes = jax.eval_shape(lambda: LayerCache.zeros(config, BATCH, MAX_LEN, "float16"))
    heads = config.num_key_value_heads
    assert shapes.k.shape == shapes.v.shape == (BATCH * heads, MAX_LEN, config.head_dim)


def test_more_tokens_than_slots_raise():
    config = CONFIGS["llama2"]
    cache = LayerCache.zeros(config, BATCH, TIME - 1, "float32")
    with pytest.raises(ValueError, match=f"time={TIME} tokens do not fit .* max_len={TIME - 1}"):
        llama.block_step(config, random_params(config, 0)["layers_0"], embedded(config), cache)
