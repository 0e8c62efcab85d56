"""Export: what other tools read is the model that the packed checkpoint stands for."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoint as tiny
from safetensors import safe_open

from gptvq_jax.core.int8_rows import int8_rows
from gptvq_jax.core.vq_tensor import dequantize
from gptvq_jax.exchange.hf_dense import hf_dense
from gptvq_jax.exchange.hf_layout import hf_tensors
from gptvq_jax.models.llama import Decoder
from gptvq_jax.storage.checkpoint import PackedCheckpoint

SCRIPT = Path(__file__).parents[2] / "scripts/export.py"
TIED = dataclasses.replace(tiny.MODEL, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return PackedCheckpoint(tiny.write_checkpoint(tmp_path_factory.mktemp("untied") / "c"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return PackedCheckpoint(tiny.write_checkpoint(tmp_path_factory.mktemp("tied") / "c", TIED))


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    return PackedCheckpoint(
        tiny.write_checkpoint(tmp_path_factory.mktemp("int8") / "c", embeddings="int8")
    )


def read(directory):
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def test_tensors_are_named_and_turned_as_in_hugging_face(checkpoint, tmp_path):
    blocks = []
    hf_dense(checkpoint, tmp_path / "out", on_block=lambda: blocks.append(1))
    tensors = read(tmp_path / "out")
    assert len(blocks) == 2
    assert len(tensors) == 2 * 9 + 3
    block, outer = checkpoint.block(1), checkpoint.outer()
    for name, expected in {
        "model.layers.1.self_attn.k_proj.weight": block["self_attn"]["k_proj"]["kernel"].T,
        "model.layers.1.mlp.down_proj.weight": block["mlp"]["down_proj"]["kernel"].T,
        "model.layers.1.input_layernorm.weight": block["input_layernorm"]["scale"],
        "model.embed_tokens.weight": outer["embed_tokens"]["embedding"],
        "model.norm.weight": outer["norm"]["scale"],
        "lm_head.weight": outer["lm_head"]["kernel"].T,
    }.items():
        assert tensors[name].dtype == np.float32
        np.testing.assert_array_equal(tensors[name], expected)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("source", "shard_bytes"), [("checkpoint", 10**9), ("tied", 20_000), ("int8", 10**9)]
)
def test_transformers_computes_the_same_logits(source, shard_bytes, tmp_path, request):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    checkpoint = request.getfixturevalue(source)
    config = checkpoint.config
    hf_dense(checkpoint, tmp_path / "out", shard_bytes=shard_bytes)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 3) == (shard_bytes == 20_000)

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(2, 50))
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(tokens)).logits.numpy()
    params = checkpoint.outer()
    for index in range(config.num_hidden_layers):
        params[f"layers_{index}"] = checkpoint.block(index)
    logits = jax.jit(Decoder(config).apply)({"params": params}, jnp.asarray(tokens))
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w3 w5").input_ids == [3, 5]


@pytest.mark.skipif(
    "GPTVQ_TRANSFORMERS4_PYTHON" not in os.environ,
    reason="GPTVQ_TRANSFORMERS4_PYTHON names no Python with transformers 4",
)
def test_transformers_4_reads_tokenizer_and_config(checkpoint, tmp_path):
    hf_dense(checkpoint, tmp_path / "out")
    program = (
        "import json, sys, transformers as t; path = sys.argv[1]; ids = "
        "t.AutoTokenizer.from_pretrained(path)('w3 w5').input_ids; "
        "print(t.__version__, t.AutoConfig.from_pretrained(path).hidden_size, json.dumps(ids))"
    )
    done = subprocess.run(
        [os.environ["GPTVQ_TRANSFORMERS4_PYTHON"], "-c", program, str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    version, hidden, ids = done.stdout.splitlines()[-1].split(maxsplit=2)
    assert version.startswith("4.") and int(hidden) == tiny.MODEL.hidden_size
    assert json.loads(ids) == checkpoint.tokenizer("w3 w5").input_ids == [3, 5]


def test_int8_embeddings_are_exported_dequantized(int8, tmp_path):
    hf_dense(int8, tmp_path / "out")
    tensors, outer = read(tmp_path / "out"), tiny.random_outer(7)
    for name, matrix in {
        "model.embed_tokens.weight": outer["embed_tokens"]["embedding"],
        "lm_head.weight": outer["lm_head"]["kernel"].T,
    }.items():
        expected = np.asarray(dequantize(int8_rows(matrix)))
        assert tensors[name].dtype == np.float32
        np.testing.assert_array_equal(tensors[name], expected)
        np.testing.assert_allclose(tensors[name], matrix, rtol=0, atol=np.abs(matrix).max() / 250)


def test_shards_are_indexed_and_small(checkpoint, tmp_path):
    hf_dense(checkpoint, tmp_path / "out", shard_bytes=20_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    total = 0
    for file in files:
        with safe_open(tmp_path / "out" / file, framework="numpy") as opened:
            names = list(opened.keys())
            sizes = [opened.get_tensor(name).nbytes for name in names]
        assert {index["weight_map"][name] for name in names} == {file}
        assert sum(sizes) <= 20_000
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total
    expected = dict(hf_tensors(checkpoint.outer()))
    assert read(tmp_path / "out").keys() >= expected.keys()
    assert not list((tmp_path / "out").glob("*.part"))


@pytest.mark.parametrize(("dtype", "numpy"), [("float16", np.float16), ("bfloat16", None)])
def test_dtype_rounds_every_tensor(checkpoint, tmp_path, dtype, numpy):
    hf_dense(checkpoint, tmp_path / "exact")
    hf_dense(checkpoint, tmp_path / "out", dtype)
    rounded = read(tmp_path / "out")
    for name, tensor in read(tmp_path / "exact").items():
        np.testing.assert_array_equal(rounded[name], tensor.astype(numpy or ml_dtypes.bfloat16))
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == dtype


def test_output_in_use_is_refused(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(ValueError, match="out exists and is not an empty directory; choose"):
        hf_dense(checkpoint, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(ValueError, match="exists and is not an empty directory"):
        hf_dense(checkpoint, tmp_path / "out/mine")
    with pytest.raises(ValueError, match="cannot write to"):
        hf_dense(checkpoint, tmp_path / "out/mine/deeper")
    (tmp_path / "out/mine").unlink()
    hf_dense(checkpoint, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").exists()


def test_failed_export_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    outer = checkpoint.outer()
    outer["norm"]["scale"][0] = 1e6
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "outer", lambda: outer)
        with pytest.raises(ValueError, match=r"model\.norm\.weight holds 1e\+06, .* use bfloat16"):
            hf_dense(checkpoint, tmp_path / "out", "float16")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="dtype='int8' must be one of"):
        hf_dense(checkpoint, tmp_path / "out", "int8")


def test_script_exports_and_reports_errors_in_one_line(checkpoint, tmp_path):
    def script(*flags):
        command = [sys.executable, str(SCRIPT), *flags]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    missing = script("--checkpoint=nowhere", "--output=out")
    assert missing.returncode == 1
    line = f"error: no checkpoint directory {tmp_path / 'nowhere'}; check the path\n"
    assert missing.stderr == line
    done = script(f"--checkpoint={checkpoint.directory}", "--output=out", "--dtype=bfloat16")
    assert (done.returncode, done.stdout) == (0, "c written to out as hf-dense, bfloat16\n")
    assert "2/2" in done.stderr
    assert len(read(tmp_path / "out")) == 21
    assert "WARNING" not in done.stderr
