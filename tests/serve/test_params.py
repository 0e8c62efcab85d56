"""What is in memory while serving: packed weights, and nothing decoded from them."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_checkpoint import TIED, embedding_checkpoints, write_checkpoint

from gptvq_jax.serve import generate as driver
from gptvq_jax.serve.params import dense_params, float32_bytes, memory_bytes, packed_params
from gptvq_jax.serve.sampling import Sampling
from gptvq_jax.storage.checkpoint import PackedCheckpoint

checkpoint = embedding_checkpoints()


def test_memory_is_what_the_checkpoint_stores(checkpoint):
    params, manifest = packed_params(checkpoint, "reference"), checkpoint.manifest
    packed, dense = memory_bytes(params)
    assert packed + dense == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    stored_packed = manifest["quantized_bytes"] + manifest["embedding_bytes"]
    # int8 rows lack the table of their 256 levels here.
    assert stored_packed - 2 * 512 <= packed <= stored_packed
    assert dense == manifest["dense_bytes"]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_memory_of_dense_weights(checkpoint):
    full = memory_bytes(dense_params(checkpoint))
    assert full == (0, float32_bytes(checkpoint.config))
    half = memory_bytes(dense_params(checkpoint, "bfloat16"))[1]
    norms = 4 * checkpoint.config.hidden_size * (2 * checkpoint.config.num_hidden_layers + 1)
    assert half - norms == (full[1] - norms) / 2


def test_state_is_donated_and_weights_are_not(tmp_path):
    tied = PackedCheckpoint(write_checkpoint(tmp_path / "tied", TIED))
    params = packed_params(tied, "reference")
    plan = driver.Plan(tied.config, (), Sampling(), max_len=32, dtype="float32")
    tokens, lengths = np.zeros((2, 16), np.int32), np.array([3, 4], np.int32)
    state = driver.prefill(plan, params, tokens, lengths, jax.random.key(0))
    buffers = [cache.k.unsafe_buffer_pointer() for cache in state.caches]
    after, _ = driver.decode(plan, params, state, 4)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert {cache.k.unsafe_buffer_pointer() for cache in after.caches} & set(buffers)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    np.testing.assert_array_equal(after.positions, lengths + 4)


def test_no_decoded_model_is_kept_while_stepping(tmp_path):
    config = dataclasses.replace(TIED, num_hidden_layers=4)
    checkpoint = PackedCheckpoint(write_checkpoint(tmp_path / "deep", config))
    params = packed_params(checkpoint, "xla")
    plan = driver.Plan(config, (), Sampling(), max_len=32, dtype="float32")
    inputs = (plan, params, np.zeros((1, 16), np.int32), np.array([3]), jax.random.key(0))
    decoded = float32_bytes(config) - 4 * config.vocab_size * config.hidden_size
    lowered = driver.prefill.lower(*inputs)
    state = jax.eval_shape(driver.prefill, *inputs)
    for compiled in (lowered.compile(), driver.decode.lower(plan, params, state, 0).compile()):
        assert compiled.memory_analysis().temp_size_in_bytes < decoded / 2


def test_unknown_implementation_raises(checkpoint):
    with pytest.raises(ValueError, match="implementation='fast' must be one of auto"):
        packed_params(checkpoint, "fast")


def test_a_layer_that_an_implementation_does_not_have_is_named(tmp_path):
    checkpoint = PackedCheckpoint(write_checkpoint(tmp_path / "tied", TIED))
    with pytest.raises(NotImplementedError, match="^layers_0/self_attn/._proj: .* use 'xla'"):
        packed_params(checkpoint, "cpu_int8")
    for name in ("pallas_gpu", "cuda"):
        with pytest.raises(
            NotImplementedError, match=f"^vq_matmul implementation '{name}' .* needs a GPU"
        ):
            packed_params(checkpoint, name)
