"""A block as one C++ call computes what models/llama.py does, for every family."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import random_tensor
from tiny_families import CONFIGS, write_model

from gptvq_jax.models.kv_cache import LayerCache
from gptvq_jax.models.llama import block_step, get_layer, with_layer
from gptvq_jax.models.open import open_source
from gptvq_jax.ops.vq_matmul import make_kernel
from gptvq_jax.serve.native_block import native_step, runs_natively

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)
# Between them: biases, norms behind layers, norms of queries and keys of both kinds, partial and
# no rotary embeddings, a factor of theirs, windows, caps, multipliers, both activations.
_DAILY = ("gemma2", "olmo2", "qwen3", "phi3", "granite", "smollm3")
_SLOTS, _AT = 48, (5, 30, 47)  # of the caches; positions of the sequences


def packed_block(source, index, implementation="cpu"):
    """Of a model, with random codes in place of its weights."""
    block = jax.tree.map(jnp.asarray, source.block(index))
    for seed, name in enumerate(source.config.of_block(index).linear_layers):
        cols, rows = get_layer(block, name)["kernel"].shape
        kind = "trellis" if name.endswith("up_proj") and implementation == "cpu" else "int8"
        tensor = random_tensor(kind, rows, cols, seed)
        block = with_layer(block, name, make_kernel(tensor, implementation))
    return block


def arguments(config, dtype="float32", time=1):
    """x, a cache and positions, at random."""
    rng = np.random.default_rng(0)
    cache = LayerCache.zeros(config, len(_AT), _SLOTS, dtype)
    cache = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), dtype), cache)
    x = jnp.asarray(rng.normal(size=(len(_AT), time, config.hidden_size)), dtype)
    return x, cache, jnp.asarray(_AT, jnp.int32)[:, None] - jnp.arange(time)[::-1]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in _DAILY else pytest.mark.slow) for name in CONFIGS],
)
def test_it_is_the_block_of_the_family(name, tmp_path):
    source = open_source(str(write_model(tmp_path, name)))
    kinds = {source.config.of_block(i): i for i in reversed(range(source.config.num_hidden_layers))}
    for config, index in kinds.items():
        x, cache, positions = arguments(config)
        if config.experts:
            assert not runs_natively(config, source.block(index), x, cache, positions)
            continue
        block = packed_block(source, index)
        assert runs_natively(config, block, x, cache, positions)
        y, after = native_step(config, block, x, cache, positions)
        expected, cache = block_step(config, block, x, cache, positions)
        scale = np.abs(np.asarray(expected)).max()
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * scale)
        for got, wanted in zip(jax.tree.leaves(after), jax.tree.leaves(cache), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    source = open_source(str(write_model(tmp_path_factory.mktemp("llama"), "llama")))
    return source.config, source, packed_block(source, 0)


def test_what_it_does_not_take_is_left_to_xla(llama):
    config, source, block = llama
    x, cache, positions = arguments(config)
    assert runs_natively(config, block, x, cache, positions)
    assert not runs_natively(config, block, x, cache, None)
    assert not runs_natively(config, block, *arguments(config, time=2))
    assert not runs_natively(config, block, *arguments(config, "bfloat16"))
    assert not runs_natively(config, source.block(0), x, cache, positions)  # dense
    assert not runs_natively(config, packed_block(source, 0, "xla"), x, cache, positions)


def test_caches_are_written_in_place(llama):
    config, _, block = llama
    x, cache, positions = arguments(config)
    step = jax.jit(native_step, static_argnums=0, donate_argnums=3)
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)]
    _, after = step(config, block, x, cache, positions)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after)] == before


def test_what_is_no_number_stays_none(llama):
    config, _, block = llama
    x, cache, positions = arguments(config)
    y, _ = native_step(config, block, x.at[1, 0, 3].set(jnp.nan), cache, positions)
    assert [bool(jnp.isnan(row).all()) for row in y] == [False, True, False]
    assert jnp.isfinite(y[::2]).all()


def test_a_position_outside_of_the_cache_is_refused(llama):
    config, _, block = llama
    x, cache, positions = arguments(config)
    with pytest.raises(ValueError, match="a position is outside of the cache"):
        jax.block_until_ready(native_step(config, block, x, cache, positions + 1))
