"""Synthetic checkpoints: true shapes, resumed to the same bytes, refused where they cannot be."""

import json

import numpy as np
import pytest

from gptvq_jax.files import disk_space
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.open import open_source
from gptvq_jax.models.shapes import block_shapes
from gptvq_jax.study import random_model, synthetic
from gptvq_jax.study.synthetic import RECORD, hf_fields, make_synthetic

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 300,
}


def write_config(path, **fields):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL, **fields}))
    return str(path / "config.json")


@pytest.fixture
def like(tmp_path):
    return write_config(tmp_path / "like")


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model_type": "phi3"},  # fused
        {"model_type": "gemma3_text", "sliding_window": 4},  # norms of 1 + scale, kinds of blocks
        {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1},
        {"model_type": "seed_oss", "attention_bias": True},
    ],
    ids=lambda fields: fields.get("model_type", "llama"),
)
def test_a_family_opens_and_has_the_shapes(tmp_path, fields):
    out = make_synthetic(write_config(tmp_path / "like", **fields), str(tmp_path / "out"), 3)
    source = open_source(str(out))
    assert source.config.num_hidden_layers == 3
    assert source.config.model_type == fields.get("model_type", "llama")
    block = source.block(2)
    shapes = block_shapes(source.config.of_block(2))
    up = [name for name in shapes if name.endswith(("up_proj.weight", "experts.0.w3.weight"))]
    assert shapes[up[0]] == (640, 32)
    norm = np.asarray(block["input_layernorm"]["scale"]) + source.config.family.norm_offset
    assert 0.9 < norm.mean() < 1.1 and 0.05 < norm.std() < 0.15
    text = "Größe <s>"
    assert source.tokenizer.decode(source.tokenizer(text).input_ids) == text
    assert len(source.tokenizer) <= source.config.vocab_size


def test_weights_have_unit_gain_and_columns_that_stand_out(tmp_path, like):
    block = open_source(str(make_synthetic(like, str(tmp_path / "out")))).block(0)
    kernel = np.asarray(block["mlp"]["down_proj"]["kernel"])  # (in, out)
    scales = np.sqrt(np.mean(np.square(kernel), axis=1) * 640 * 2 * 4)  # 4 blocks add to x
    assert np.sqrt(np.mean(np.square(scales))) == pytest.approx(1, rel=0.05)
    assert scales.max() > 2 * np.median(scales)


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, like, monkeypatch):
    whole = contents(make_synthetic(like, str(tmp_path / "whole")))
    write, calls = random_model.write_stream, []

    def stops(path, *rest):
        calls.append(path.name)
        if len(calls) == 3:
            (path.parent / "x.partial").write_text("what a killed process leaves")
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(random_model, "write_stream", stops)
    with pytest.raises(KeyboardInterrupt):
        make_synthetic(like, str(tmp_path / "out"))
    assert "config.json" not in contents(tmp_path / "out")
    assert contents(make_synthetic(like, str(tmp_path / "out"))) == whole
    assert len(calls) == 3 + 3  # two files of five were there


def test_seeds_differ_and_a_directory_keeps_its_own(tmp_path, like):
    out = make_synthetic(like, str(tmp_path / "out"))
    other = make_synthetic(like, str(tmp_path / "other"), seed=1)
    name = "model-00002-of-00005.safetensors"
    assert contents(out)[name] != contents(other)[name]
    with pytest.raises(ValueError, match=f"another synthetic model.*{RECORD}"):
        make_synthetic(like, str(out), seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    with pytest.raises(ValueError, match="not an empty directory"):
        make_synthetic(like, str(tmp_path / "mine"))


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(disk_space, "_free", lambda path: 10**9)
    with pytest.raises(OSError, match=r"needs 137.95 GB more, and 1.00 GB are free"):
        make_synthetic("llama2_70b", str(tmp_path / "out"))
    assert "80 blocks, 137.95" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="--blocks=81 must be from 1 to 80"):
        hf_fields("llama2_70b", 81)
    with pytest.raises(FileNotFoundError, match=r"no such file.*none\.json"):
        hf_fields(str(tmp_path / "none.json"))
    small = write_config(tmp_path / "small", vocab_size=258)
    with pytest.raises(ValueError, match="vocabulary of 258.*needs 259"):
        make_synthetic(small, str(tmp_path / "out"))


def test_lists_of_blocks_are_cut(tmp_path):
    kinds = ["full_attention", "sliding_attention"] * 2
    like = write_config(tmp_path / "like", model_type="gemma2", layer_types=kinds, sliding_window=8)
    config = synthetic.model_config(like, 3)
    windows = [config.of_block(index).sliding_window for index in range(3)]
    assert windows == [None, 8, None]
    assert ModelConfig.from_hf(hf_fields(like)[1]).num_hidden_layers == 4
