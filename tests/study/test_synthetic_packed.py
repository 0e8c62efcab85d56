"""Packed checkpoints of random codes: complete, of the format that was asked for, and they run."""

import json
import subprocess
import sys

import numpy as np
import pytest
from documented import REPOSITORY

from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.files import disk_space
from gptvq_jax.models.llama import get_layer
from gptvq_jax.serve.generate import generate
from gptvq_jax.serve.served_model import ServedModel
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.study.decode_formats import random_quantized
from gptvq_jax.study.synthetic_packed import make_packed

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}


def like(path, **fields):
    path.mkdir()
    file = path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", **SMALL, **fields}))
    return str(file)


@pytest.mark.parametrize(
    "packed, fields",
    [("2d_2.125", {}), ("trellis_2.0_l8", {}), ("aqlm_2x8", MIXTRAL)],
    ids=["2d", "trellis", "experts"],
)
def test_every_layer_has_the_format_and_the_model_runs(tmp_path, packed, fields):
    out = make_packed(like(tmp_path / "like", **fields), str(tmp_path / "out"), packed, 2)
    checkpoint = PackedCheckpoint(out)
    assert checkpoint.config.num_hidden_layers == 2
    block = checkpoint.packed_block(1)
    for name in checkpoint.config.linear_layers:
        leaf = get_layer(block, name)["kernel"]
        assert isinstance(leaf, QuantizedTensor)
        expected = random_quantized(packed, *leaf.shape)
        assert type(leaf) is type(expected)
        # Rates of trellis columns are drawn.
        assert leaf.num_bytes == pytest.approx(expected.num_bytes, rel=0.15)
    tensor = checkpoint.packed_block(0)["self_attn"]["q_proj"]["kernel"]
    assert not np.array_equal(tensor.codes, block["self_attn"]["q_proj"]["kernel"].codes)
    served = ServedModel(str(out), None, "xla")
    found = generate(checkpoint.config, served.params("float32"), [[1, 2, 3]], max_tokens=3)
    assert len(found.tokens[0]) == 3


def test_the_command_and_its_seed(tmp_path):
    config = like(tmp_path / "like")
    command = [sys.executable, str(REPOSITORY / "scripts/make_synthetic.py"), f"--like={config}"]
    command += ["--packed=1d_3.125", "--seed=1", f"--output={tmp_path / 'by_command'}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert f"--checkpoint={tmp_path / 'by_command'}" in said.stdout
    made = PackedCheckpoint(tmp_path / "by_command")
    same = PackedCheckpoint(make_packed(config, str(tmp_path / "same"), "1d_3.125", seed=1))
    other = PackedCheckpoint(make_packed(config, str(tmp_path / "other"), "1d_3.125", seed=2))
    assert made.fingerprint == same.fingerprint != other.fingerprint


def test_bad_input(tmp_path, monkeypatch):
    config = like(tmp_path / "like")
    with pytest.raises(ValueError, match=r"unknown format '9d'; choose from .*2d_2\.125"):
        make_packed(config, str(tmp_path / "out"), "9d")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    with pytest.raises(ValueError, match="used"):
        make_packed(config, str(tmp_path / "used"), "2d_2.125")
    monkeypatch.setattr(disk_space, "_free", lambda path: 10**9)
    with pytest.raises(OSError, match="needs 2.2"):
        make_packed("llama2_7b", str(tmp_path / "large"), "2d_2.125")
    assert not (tmp_path / "large").exists()
