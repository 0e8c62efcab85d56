"""Embeddings that are looked up in packed codes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint as tiny

from gptvq_jax.core.vq_tensor import take_rows
from gptvq_jax.models.llama import Decoder
from gptvq_jax.ops.coded_rows import CodedRows
from gptvq_jax.serve.params import dense_params, packed_params
from gptvq_jax.storage.checkpoint import CheckpointWriter, PackedCheckpoint

KINDS = [kind for kind in tiny.KINDS if kind != "trellis"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_whole_weight(kind):
    tensor = tiny.random_tensor(kind, 40, 36)
    whole = np.asarray(tensor.dequantize())
    rows = np.array([[0, 39, 7], [7, 13, 26]])
    np.testing.assert_array_equal(take_rows(tensor, rows.ravel()), whole[rows.ravel()])
    leaf = CodedRows.make(tensor, tied=False)
    found = jax.jit(lambda leaf, rows: leaf.take(rows))(leaf, rows)
    np.testing.assert_allclose(found, whole[rows], rtol=1e-6)
    outside = np.asarray(leaf.take(jnp.array([0, 40, -1])))
    assert np.isfinite(outside[0]).all() and np.isnan(outside[1:]).all()


def test_a_tied_one_is_multiplied_with_too():
    tensor = tiny.random_tensor("int8", 40, 36)
    x = np.random.default_rng(0).normal(size=(2, 3, 36)).astype(np.float32)
    leaf = CodedRows.make(tensor, tied=True, implementation="xla")
    expected = x.astype(np.float64) @ np.asarray(tensor.dequantize(), np.float64).T
    np.testing.assert_allclose(x @ leaf, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no head"):
        x @ CodedRows.make(tensor, tied=False)


def test_damaged_codes_are_refused():
    tensor = tiny.random_tensor("int8", 40, 36)
    with pytest.raises(ValueError, match="codes must be"):
        CodedRows.make(dataclasses.replace(tensor, codes=tensor.codes[:, 1:]), tied=False)


@pytest.mark.parametrize("config", [tiny.TIED, tiny.MODEL], ids=["tied", "untied"])
def test_a_model_runs_from_a_coded_embedding(config, tmp_path):
    path = tiny.write_checkpoint(tmp_path / "packed", config)
    outer = tiny.random_outer(7, config)
    outer["embed_tokens"]["embedding"] = tiny.random_tensor("int4", 40, 36)
    if "lm_head" in outer:
        outer["lm_head"]["kernel"] = tiny.random_tensor("trellis", 40, 36)
    writer = CheckpointWriter(path)
    writer.write_outer(outer)
    manifest = writer.finalize({}, config, "tiny", "0123")
    assert manifest["embeddings"].keys() >= {"embed_tokens/embedding"}
    packed = PackedCheckpoint(path)
    run, tokens = jax.jit(Decoder(config).apply), np.array([[5, 9, 11, 39]])
    own = run({"params": packed_params(packed, "xla")}, tokens)
    np.testing.assert_allclose(
        own, run({"params": dense_params(packed)}, tokens), rtol=1e-3, atol=1e-3
    )
