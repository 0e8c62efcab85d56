"""Embeddings that are looked up in packed codes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint as tiny

from gptvq_jax.models.llama import Decoder
from gptvq_jax.ops.coded_rows import CodedRows
from gptvq_jax.serve.params import dense_params, packed_params
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.checkpoint_writer import CheckpointWriter

# Those of every kind of codebook and of scales; the others in the slow ones.
KINDS = [
    kind if kind in ("int4", "svd int8", "aqlm") else pytest.param(kind, marks=pytest.mark.slow)
    for kind in tiny.KINDS
    if kind != "trellis"
]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_whole_weight(kind):
    tensor = tiny.random_tensor(kind, 40, 36)
    leaf, rows = CodedRows.make(tensor, tied=False), jnp.array([[0, 39, 7], [40, 13, -1]])
    found, whole = jax.jit(lambda leaf: (leaf.take(rows), leaf.tensor.dequantize()))(leaf)
    inside = (rows >= 0) & (rows < 40)
    np.testing.assert_allclose(found[inside], whole[rows[inside]], rtol=1e-6)
    assert np.isnan(found[~inside]).all()


def test_a_tied_one_is_multiplied_with_too():
    tensor = tiny.random_tensor("int8", 40, 36)
    x = np.random.default_rng(0).normal(size=(2, 3, 36)).astype(np.float32)
    leaf = CodedRows.make(tensor, tied=True, implementation="xla")
    expected = x.astype(np.float64) @ np.asarray(tensor.dequantize(), np.float64).T
    np.testing.assert_allclose(jnp.asarray(x) @ leaf, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no head"):
        jnp.asarray(x) @ CodedRows.make(tensor, tied=False)


def test_damaged_codes_are_refused():
    tensor = tiny.random_tensor("int8", 40, 36)
    with pytest.raises(ValueError, match="codes must be"):
        CodedRows.make(dataclasses.replace(tensor, codes=tensor.codes[:, 1:]), tied=False)


@pytest.mark.parametrize(
    "config", [tiny.TIED, pytest.param(tiny.MODEL, marks=pytest.mark.slow)], ids=["tied", "untied"]
)
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
