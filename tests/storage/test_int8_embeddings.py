"""Embeddings and heads as int8 rows in the packed checkpoint."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny_checkpoint as tiny
from orbax.checkpoint import v1 as ocp

from gptvq_jax.console.report import summary_text
from gptvq_jax.run.evaluate import perplexity
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.checkpoint_writer import CheckpointWriter
from gptvq_jax.storage.dequantize import dequantize_tree
from gptvq_jax.storage.tree_io import load_tree


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def int8(request, tmp_path_factory):
    config = dataclasses.replace(tiny.MODEL, tie_word_embeddings=request.param)
    return tiny.write_checkpoint(tmp_path_factory.mktemp("int8") / "checkpoint", config, "int8")


def matrices(outer):
    """{name in the manifest: its (vocab, hidden) matrix}"""
    found = {"embed_tokens/embedding": outer["embed_tokens"]["embedding"]}
    return found | ({"lm_head": outer["lm_head"]["kernel"].T} if "lm_head" in outer else {})


def test_int8_embeddings_survive_disk(int8):
    checkpoint = PackedCheckpoint(int8)
    outer = tiny.random_outer(7, checkpoint.config)
    expected = {**tiny.int8_outer(outer), "norm": tiny.half(outer["norm"])}
    tiny.assert_same_tree(load_tree(int8 / "outer")[0], expected)

    loaded = checkpoint.outer()
    assert jax.tree.map(tiny.signature, loaded) == jax.tree.map(tiny.signature, outer)
    tiny.assert_same_tree(loaded["norm"], dequantize_tree(expected["norm"]))
    values = matrices(loaded)
    for name, matrix in matrices(outer).items():
        half_step = np.abs(matrix.astype(np.float64)).max(1, keepdims=True) / 255
        error = np.abs(values[name] - matrix.astype(np.float64))
        assert np.all(error <= half_step * (1 + 2.0**-9))  # a scale may be rounded up
        assert error.max() > half_step.min() / 2


def test_manifest_counts_int8_embeddings_apart(int8, complete):
    checkpoint = PackedCheckpoint(int8)
    manifest, dense = checkpoint.manifest, PackedCheckpoint(complete).manifest
    for field in ("bits_per_value", "quantized_bytes", "layers"):
        assert manifest[field] == dense[field]
    written = matrices(tiny.random_outer(7, checkpoint.config))
    rows, cols = tiny.MODEL.vocab_size, tiny.MODEL.hidden_size
    num_bytes = rows * cols + 2 * rows + 2 * 256
    assert manifest["embeddings"].keys() == written.keys()
    assert manifest["embedding_bytes"] == len(written) * num_bytes
    for name, meta in manifest["embeddings"].items():
        assert (meta["shape"], meta["num_bytes"]) == ([rows, cols], num_bytes)
        assert meta["bits_per_value"] == 8 * num_bytes / (rows * cols)
        assert len(meta["sha256"]) == 64
        assert not any(dense_name.startswith(name) for dense_name in manifest["dense"])
    assert manifest["dense"]["norm/scale"] == dense["dense"]["norm/scale"]

    stored = [ocp.load(path) for path in (*int8.glob("blocks/*/arrays"), int8 / "outer/arrays")]
    counted = [manifest[f"{part}_bytes"] for part in ("quantized", "embedding", "dense")]
    assert sum(counted) == sum(array.nbytes for array in jax.tree.leaves(stored))


def test_int8_embeddings_hardly_change_perplexity(int8, tmp_path):
    checkpoint = PackedCheckpoint(int8)
    dense = PackedCheckpoint(tiny.write_checkpoint(tmp_path / "dense", checkpoint.config))
    tokens = np.random.default_rng(0).integers(tiny.MODEL.vocab_size, size=(2, 20), dtype=np.int32)
    before, after = perplexity(dense, tokens), perplexity(checkpoint, tokens)
    assert before != after
    assert after == pytest.approx(before, rel=0.05)


def test_embeddings_of_another_run_are_found(int8, tmp_path):
    copy = shutil.copytree(int8, tmp_path / "checkpoint")
    manifest = (copy / "manifest.json").read_bytes()
    config = PackedCheckpoint(copy).config
    for outer in (tiny.int8_outer(tiny.random_outer(8, config)), tiny.random_outer(7, config)):
        CheckpointWriter(copy).write_outer(outer)
        (copy / "manifest.json").write_bytes(manifest)
        with pytest.raises(ValueError, match=r"embed_tokens/embedding in .* from another run"):
            PackedCheckpoint(copy).outer()


def test_manifest_without_embeddings_is_read(copy):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["embeddings"], manifest["embedding_bytes"]  # as written before they existed
    path.write_text(json.dumps(manifest))
    outer = dequantize_tree(tiny.half(tiny.random_outer(7)))
    tiny.assert_same_tree(PackedCheckpoint(copy).outer(), outer)
    manifest = path.read_bytes()
    CheckpointWriter(copy).write_outer(tiny.int8_outer(outer))
    path.write_bytes(manifest)
    with pytest.raises(ValueError, match=r"embed_tokens/embedding in .* from another run"):
        PackedCheckpoint(copy).outer()


def test_summary_shows_embeddings_where_they_are_int8():
    summary = dict.fromkeys(
        ("bits_per_value", "num_layers", "checkpoint_bytes", "quantized_bytes", "dense_bytes",
         "seconds", "compile_seconds", "peak_memory_bytes"), 0
    )  # fmt: skip
    summary |= {"perplexity_float": 2.0, "perplexity_quantized": 3.0, "stages": {}}
    summary |= {"evaluation": "text", "calibration": "text"}
    text = summary_text(summary | {"embedding_bytes": 3 * 2**19})
    assert "quantized layers 0.0 MiB, int8 embeddings 1.5 MiB, dense leaves 0.0 MiB" in text
    assert "embeddings" not in summary_text(summary | {"embedding_bytes": 0})
