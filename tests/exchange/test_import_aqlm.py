"""Import of models of the aqlm package: exact copies, and what may be wrong with one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoint as tiny
from safetensors.numpy import load_file, save_file

from gptvq_jax.exchange.aqlm_source import AQLMSource
from gptvq_jax.exchange.hf_aqlm import hf_aqlm
from gptvq_jax.exchange.import_aqlm import import_aqlm
from gptvq_jax.models.hf_directory import HFDirectory
from gptvq_jax.models.llama import with_layer
from gptvq_jax.models.open import open_source
from gptvq_jax.run.evaluate_job import evaluate
from gptvq_jax.serve.stop_tokens import stop_tokens
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.study.sample_tensors import TensorFormat

SCRIPT = Path(__file__).parents[2] / "scripts/import.py"
FORMATS = {
    "2x8": TensorFormat(8, 8, codebook_bits=16, num_codebooks=2, row_scales=True),
    "1x12": TensorFormat(8, 12, codebook_bits=16, row_scales=True),
}
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Packed checkpoints, and what hf_aqlm makes of them: c_2x8, 2x8, ..."""
    path = tmp_path_factory.mktemp("models")
    for name, fmt in FORMATS.items():
        blocks = [tiny.random_block(index, tiny.WHOLE_VECTORS, fmt) for index in (0, 1)]
        # One layer is dense.
        blocks[0] = with_layer(blocks[0], "mlp/down_proj", np.eye(48, 32, dtype=np.float32))
        packed = tiny.write_checkpoint(path / f"c_{name}", tiny.WHOLE_VECTORS, blocks=blocks)
        hf_aqlm(PackedCheckpoint(packed), path / name, "float32")
    return path


def open_aqlm(path):
    return AQLMSource(HFDirectory(path))


def changed(directory, path, tensors=None, config=None):
    """A copy of a model with other tensors (None: without it) and fields of its config."""
    shutil.copytree(directory, path)
    stored = load_file(path / "model.safetensors") | (tensors or {})
    stored = {name: array for name, array in stored.items() if array is not None}
    save_file(stored, path / "model.safetensors")
    hf = json.loads((path / "config.json").read_text())
    hf["quantization_config"] |= config or {}
    (path / "config.json").write_text(json.dumps(hf))
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_import_of_an_export_is_the_checkpoint(kind, directory, tmp_path):
    source, calls = open_aqlm(directory / kind), []
    import_aqlm(source, tmp_path / "back", on_block=lambda: calls.append(1))
    assert len(calls) == 2
    before, after = PackedCheckpoint(directory / f"c_{kind}"), PackedCheckpoint(tmp_path / "back")
    for index in (0, 1):
        tiny.assert_same_tree(after.packed_block(index), before.packed_block(index))
    tiny.assert_same_tree(after.packed_outer(), before.packed_outer())
    assert after.tokenizer("w3 w5").input_ids == [3, 5]
    manifest = after.manifest
    assert manifest["config"] == {
        "imported_from": "hf-aqlm",
        "model": kind,
        "dense_dtype": "float16",
    }
    assert manifest["source"] == {"name": kind, "fingerprint": source.fingerprint}
    same = ("model", "layers", "dense", "bits_per_value")
    assert {key: manifest[key] for key in same} == {key: before.manifest[key] for key in same}


def test_companions_and_a_stored_head_come_along(directory, tmp_path):
    path = changed(directory / "2x8", tmp_path / "model")
    texts = {
        "generation_config.json": '{"eos_token_id": [1, 7]}',
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in texts.items():
        (path / name).write_text(text)
    hf = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**hf, "tie_word_embeddings": True}))
    import_aqlm(open_aqlm(path), tmp_path / "packed")
    after, before = PackedCheckpoint(tmp_path / "packed"), PackedCheckpoint(directory / "c_2x8")
    assert stop_tokens(after) == (1, 2, 7)
    # As in transformers, a head that is stored and differs is no copy of the embedding.
    assert not after.config.tie_word_embeddings
    tiny.assert_same_tree(after.packed_outer(), before.packed_outer())
    hf_aqlm(after, tmp_path / "out")
    for name, text in texts.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_shards_of_other_dtypes(directory, tmp_path):
    checkpoint = PackedCheckpoint(directory / "c_2x8")
    hf_aqlm(checkpoint, tmp_path / "many", "bfloat16", shard_bytes=20_000)
    assert (tmp_path / "many/model.safetensors.index.json").exists()
    for file in (tmp_path / "many").glob("*.safetensors"):
        tensors = load_file(file)
        for name, array in tensors.items():
            if name.endswith(".codebooks"):
                tensors[name] = array.astype(ml_dtypes.bfloat16)
            elif name.endswith(".scales"):
                tensors[name] = array.astype(np.float32)
        save_file(tensors, file)
    layer = open_aqlm(tmp_path / "many").packed_block(1)["mlp"]["up_proj"]["kernel"]
    original = checkpoint.packed_block(1)["mlp"]["up_proj"]["kernel"]
    expected = original.codebook.centroids.astype(ml_dtypes.bfloat16).astype(np.float16)
    np.testing.assert_array_equal(layer.codebook.centroids, expected, strict=True)
    np.testing.assert_array_equal(layer.row_scales, original.row_scales, strict=True)
    np.testing.assert_array_equal(layer.codes, original.codes, strict=True)


def codes(bits_dtype, value=None):
    array = np.zeros((48, 4, 1), bits_dtype)
    if value is not None:
        array[5, 2, 0] = value
    return array


FULL = np.ones((1, 4096, 1, 8), np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"codes": codes(np.int16, 3000)}, "1 codes are out of range, the first is 3000: 12 bits"),
        ({"codes": codes(np.int16, -2049)}, "the first is -2049: 12 bits hold -2048 to 2047"),
        ({"codes": codes(np.int8)}, "is stored as I8, not as I16"),
        ({"codes": codes(np.int16)[:, :3]}, r"has shape \(48, 3, 1\), .* says \(48, 4, 1\)"),
        ({"codebooks": FULL[:, :256]}, r"shape \(1, 256, 1, 8\), .* says \(1, 4096, 1, 8\)"),
        ({"codebooks": FULL.astype(np.int32)}, "is stored as I32, not as F64"),
        ({"codebooks": FULL * np.nan}, "contains NaN or Inf"),
        ({"codebooks": FULL * 1e5}, r"holds 1e\+05, too large for float16"),
        ({"scales": np.full((48, 1, 1, 1), np.inf, np.float16)}, "contains NaN or Inf"),
        ({"scales": np.ones(48, np.float16)}, r"has shape \(48,\), .* says \(48, 1, 1, 1\)"),
    ],
)
def test_damaged_layers_are_refused(tensors, message, directory, tmp_path):
    (part,) = tensors
    tensors = {f"{UP}.{part}": array for part, array in tensors.items()}
    source = open_aqlm(changed(directory / "1x12", tmp_path / "bad", tensors))
    source.packed_block(0)
    with pytest.raises(
        (ValueError, NotImplementedError),
        match=rf"model\.safetensors: tensor {UP}\.{part}.*{message}",
    ):
        source.packed_block(1)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{UP}.scales": None}, rf"lacks 1 tensor\(s\), the first is {UP}\.scales"),
        ({f"{UP}.{part}": None for part in ("codes", "codebooks", "scales")}, rf"{UP}\.weight"),
        ({f"{UP}.bias": np.zeros(48, np.float16)}, rf"does not have, the first is {UP}\.bias"),
        ({f"{UP}.weight": np.zeros((48, 32), np.float16)}, rf"not have, .*{UP}\.weight"),
    ],
)
def test_missing_and_unknown_tensors_are_refused(tensors, message, directory, tmp_path):
    path = changed(directory / "2x8", tmp_path / "bad", tensors)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        open_aqlm(path)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"quant_method": "gptq"}, NotImplementedError, "quant_method='gptq' is not supported"),
        ({"out_group_size": 2}, NotImplementedError, "out_group_size=2 is not supported, only 1"),
        ({"nbits_per_codebook": 17}, NotImplementedError, "nbits_per_codebook=17 .* up to 16"),
        ({"num_codebooks": "2"}, ValueError, "num_codebooks must be a positive integer, got '2'"),
        ({"in_group_size": 5}, ValueError, r"q_proj\.weight: 32 inputs .* vectors of 5"),
    ],
)
def test_other_configs_are_refused(config, error, message, directory, tmp_path):
    path = changed(directory / "2x8", tmp_path / "bad", config=config)
    with pytest.raises(error, match=rf"config\.json: .*{message}"):
        open_aqlm(path).packed_block(0)


def test_float_and_quantized_models_are_told_apart(directory, tmp_path):
    with pytest.raises(NotImplementedError, match=r"config\.json: .*gptvq_jax import"):
        open_source(str(directory / "2x8"))
    path = changed(directory / "2x8", tmp_path / "float")
    hf = json.loads((path / "config.json").read_text())
    del hf["quantization_config"]
    (path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match=r"not quantized; use gptvq_jax quantize"):
        open_aqlm(path)


def test_failed_import_leaves_nothing(directory, tmp_path):
    tensors = {f"{UP}.codes": codes(np.int16, 3000)}
    source = open_aqlm(changed(directory / "1x12", tmp_path / "bad", tensors))
    with pytest.raises(ValueError, match="out of range"):
        import_aqlm(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(ValueError, match="exists and is not an empty directory"):
        import_aqlm(source, tmp_path / "out")


def test_script_makes_a_checkpoint_that_is_evaluated(directory, tmp_path, capsys):
    command = [sys.executable, SCRIPT, f"--model={directory / '2x8'}", "--output=out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "2x8 written to out: 2 x 8 bits, D = 8\n")
    assert "2/2" in done.stderr
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{7 * i % 40}" for i in range(50)))
    value = evaluate(str(tmp_path / "out"), None, dataset=str(text), seqlen=16, num_windows=2)
    assert value == evaluate(
        str(directory / "c_2x8"), None, dataset=str(text), seqlen=16, num_windows=2
    )
    assert "2 x 16 tokens" in capsys.readouterr().out
