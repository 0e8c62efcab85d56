"""The packed checkpoint: bit identity, honest sizes, kills, damage."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoint as tiny
from orbax.checkpoint import v1 as ocp

from gptvq_jax.core.vq_tensor import dequantize
from gptvq_jax.methods.gptvq import quantize
from gptvq_jax.models.llama import get_layer, with_layer
from gptvq_jax.models.stages import LINEAR_LAYERS
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.checkpoint_writer import CheckpointWriter
from gptvq_jax.storage.dequantize import dequantize_tree
from gptvq_jax.storage.tensor_io import state_to_tensor, tensor_to_state
from gptvq_jax.storage.tree_io import load_tree, read_record, save_tree, write_json

ROWS, COLS = 13, 43  # divided by nothing
DATA_FILE = r"arrays/\S+/d/\w+"
NORMS = ("input_layernorm", "post_attention_layernorm")


def stored_block(directory, index):
    """A finished block of a checkpoint that need not be complete."""
    return load_tree(directory / f"blocks/{index:05d}")[0]


# --- tensors ---


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_tensor_survives_state_and_disk(kind, tmp_path):
    tensor = tiny.random_tensor(kind, ROWS, COLS)
    arrays, meta = tensor_to_state(tensor)
    assert all(type(array) is np.ndarray for array in arrays.values())
    assert sum(array.nbytes for array in arrays.values()) == tensor.num_bytes
    assert ("row_scales" in arrays) == (kind in ("aqlm", "trellis"))
    tiny.assert_same_tree(state_to_tensor(arrays, json.loads(json.dumps(meta))), tensor)

    save_tree(tmp_path / "tree", {"layer": {"kernel": tensor}}, "float16")
    tree, record = load_tree(tmp_path / "tree")
    tiny.assert_same_tree(tree["layer"]["kernel"], tensor)
    raw = ocp.load(tmp_path / "tree/arrays")["layer"]["kernel"]
    counted = 8 * sum(array.nbytes for array in raw.values()) / (ROWS * COLS)
    assert record["quantized"]["layer/kernel"]["bits_per_value"] == counted


@pytest.mark.parametrize("kind", ["svd int8", "int4"])
def test_tensor_of_quantize_survives(kind, tmp_path):
    settings = dataclasses.replace(
        tiny.settings(kind), em_iterations=1, seed="mahalanobis", codebook_update="none"
    )
    weight = jax.random.normal(jax.random.key(1), (ROWS, COLS))
    tensor = quantize(weight, jnp.eye(COLS), jnp.eye(COLS), jax.random.key(0), settings)
    expected = tiny.random_tensor(kind, ROWS, COLS)
    assert jax.tree.map(tiny.signature, tensor) == jax.tree.map(tiny.signature, expected)

    save_tree(tmp_path / "tree", {"kernel": tensor}, "float16")
    tiny.assert_same_tree(load_tree(tmp_path / "tree")[0]["kernel"], tensor)


def test_state_is_checked():
    arrays, meta = tensor_to_state(tiny.random_tensor("int8", ROWS, COLS))
    with pytest.raises(ValueError, match="format_version=4, but this gptvq_jax reads 1, 2 and 3"):
        state_to_tensor(arrays, meta | {"format_version": 4})
    with pytest.raises(ValueError, match=r"kind='lattice' .* must be one of \['dense', 'fact"):
        state_to_tensor(arrays, meta | {"kind": "lattice"})
    with pytest.raises(ValueError, match="incompletely: 'grid'"):
        state_to_tensor(arrays, {k: v for k, v in meta.items() if k != "grid"})
    for broken in (
        {k: v for k, v in arrays.items() if k != "codebook.scale"},
        arrays | {"codes": arrays["codes"][..., :-1]},
        arrays | {"codes": arrays["codes"].astype(np.int16)},
    ):
        with pytest.raises(ValueError, match=r"has arrays {.*}, not {'codes': 'uint8\[1,13,14\]'"):
            state_to_tensor(broken, meta)


def test_row_scales_do_not_get_lost():
    arrays, meta = tensor_to_state(tiny.random_tensor("aqlm", ROWS, COLS))
    del arrays["row_scales"]
    with pytest.raises(ValueError, match=r"not {.*'row_scales': 'float16\[13\]'}"):
        state_to_tensor(arrays, meta)


@pytest.mark.parametrize("kind", tiny.SETTINGS)
def test_a_tensor_of_version_1_is_read(kind):
    tensor = tiny.random_tensor(kind, ROWS, COLS)
    arrays, meta = tensor_to_state(tensor)
    assert meta["format_version"] == 3
    tiny.assert_same_tree(state_to_tensor(arrays, meta | {"format_version": 1}), tensor)


# --- whole checkpoints ---


def test_checkpoint_returns_what_was_written(complete):
    checkpoint = PackedCheckpoint(complete)
    assert checkpoint.config == tiny.MODEL
    assert checkpoint.name == "checkpoint"
    assert checkpoint.tokenizer("w3 w5").input_ids == [3, 5]
    outer = dequantize_tree(tiny.half(tiny.random_outer(7)))
    tiny.assert_same_tree(checkpoint.outer(), outer)

    for index in range(2):
        written = tiny.random_block(index)
        expected = {**written, **{norm: tiny.half(written[norm]) for norm in NORMS}}
        tiny.assert_same_tree(checkpoint.packed_block(index), expected)
        tiny.assert_same_tree(checkpoint.block(index), dequantize_tree(expected))
    kernel = checkpoint.block(0)["self_attn"]["q_proj"]["kernel"]
    weight = dequantize(tiny.random_block(0)["self_attn"]["q_proj"]["kernel"])
    assert isinstance(kernel, jax.Array) and kernel.dtype == np.float32
    np.testing.assert_allclose(kernel, weight.T, rtol=1e-6)
    with pytest.raises(ValueError, match=r"index=2 must be in 0\.\.1"):
        checkpoint.block(2)


def test_manifest_counts_the_stored_arrays(complete):
    manifest = PackedCheckpoint(complete).manifest
    blocks = [ocp.load(complete / f"blocks/{index:05d}/arrays") for index in range(2)]
    quantized = weights = 0
    for index, block in enumerate(blocks):
        for name in LINEAR_LAYERS:
            stored = sum(array.nbytes for array in get_layer(block, name)["kernel"].values())
            entry = manifest["layers"][f"layers_{index}/{name}"]
            assert entry["num_bytes"] == stored
            assert entry["bits_per_value"] == 8 * stored / np.prod(entry["shape"])
            quantized += stored
            weights += np.prod(entry["shape"])
    stored = jax.tree.leaves([blocks, ocp.load(complete / "outer/arrays")])
    assert manifest["quantized_bytes"] == quantized
    assert manifest["dense_bytes"] == sum(array.nbytes for array in stored) - quantized
    assert manifest["bits_per_value"] == 8 * quantized / weights
    assert len(manifest["layers"]) == 14
    assert {"embed_tokens/embedding", "layers_1/input_layernorm/scale"} <= manifest["dense"].keys()
    assert manifest["source"] == {"name": "tiny", "fingerprint": "0123"}
    assert (manifest["embedding_bytes"], manifest["embeddings"]) == (0, {})


def test_manifest_is_reproducible(complete, tmp_path):
    again = tiny.write_checkpoint(tmp_path / "again")
    assert (again / "manifest.json").read_bytes() == (complete / "manifest.json").read_bytes()
    assert PackedCheckpoint(again).fingerprint == PackedCheckpoint(complete).fingerprint


def test_dense_kernels_may_stay(tmp_path):
    writer = CheckpointWriter(tmp_path / "c", "bfloat16")
    kernel = np.linspace(-1e6, 1e6, 6, dtype=np.float32).reshape(2, 3)
    block = with_layer(tiny.random_block(0), "mlp/up_proj", jnp.asarray(kernel))
    writer.write_block(0, block)
    loaded = stored_block(tmp_path / "c", 0)
    rounded = kernel.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(get_layer(loaded, "mlp/up_proj")["kernel"], rounded)
    dense = get_layer(dequantize_tree(loaded), "mlp/up_proj")["kernel"]
    np.testing.assert_array_equal(dense, rounded.astype(np.float32))
    tiny.assert_same_tree(
        get_layer(loaded, "self_attn/q_proj"), get_layer(block, "self_attn/q_proj")
    )


def test_overflow_names_leaf_and_dtype(tmp_path):
    outer = tiny.random_outer(0)
    outer["embed_tokens"]["embedding"][3, 4] = -70000
    with pytest.raises(ValueError, match=r"embedding holds 7e\+04, .* float16; use bfloat16"):
        CheckpointWriter(tmp_path / "c").write_outer(outer)
    assert read_record(tmp_path / "c/outer") is None
    CheckpointWriter(tmp_path / "c", "bfloat16").write_outer(outer)
    with pytest.raises(ValueError, match="dtype='int8' must be one of float16, bfloat16, float32"):
        CheckpointWriter(tmp_path / "c", "int8")


def test_checkpoint_of_version_1_is_read(copy):
    writer, blocks = CheckpointWriter(copy), []
    for index in range(2):
        block = tiny.random_block(index)
        shape = get_layer(block, "mlp/down_proj")["kernel"].shape
        blocks.append(with_layer(block, "mlp/down_proj", tiny.random_tensor("int8", *shape)))
        writer.write_block(index, blocks[index])
    writer.finalize({}, tiny.MODEL, "tiny", "0123")
    # As written before there were row scales, of which these layers have none.
    for path in (copy / "manifest.json", *copy.rglob("record.json")):
        text = path.read_text()
        assert '"format_version": 3' in text
        path.write_text(text.replace('"format_version": 3', '"format_version": 1'))
    assert writer.finished_blocks() == 2
    checkpoint = PackedCheckpoint(copy)
    tiny.assert_same_tree(checkpoint.outer(), dequantize_tree(tiny.half(tiny.random_outer(7))))
    for index, block in enumerate(blocks):
        expected = {**block, **{norm: tiny.half(block[norm]) for norm in NORMS}}
        tiny.assert_same_tree(checkpoint.packed_block(index), expected)


# --- kills ---


def test_half_written_block_is_ignored_and_replaced(tmp_path):
    writer = CheckpointWriter(tmp_path / "c")
    assert writer.finished_blocks() == 0
    writer.write_block(0, tiny.random_block(0))
    half_written = tmp_path / "c/blocks/00001"
    half_written.mkdir()
    shutil.copytree(
        tmp_path / "c/blocks/00000/arrays", half_written / "arrays.orbax-checkpoint-tmp"
    )
    (half_written / "record.json.tmp").touch()
    assert CheckpointWriter(tmp_path / "c").finished_blocks() == 1
    with pytest.raises(FileNotFoundError, match="00001 is missing or unfinished; rerun"):
        stored_block(tmp_path / "c", 1)

    writer.write_block(1, tiny.random_block(1))
    assert writer.finished_blocks() == 2
    assert sorted(path.name for path in half_written.iterdir()) == ["arrays", "record.json"]
    kernel = get_layer(stored_block(tmp_path / "c", 1), "mlp/down_proj")["kernel"]
    tiny.assert_same_tree(kernel, get_layer(tiny.random_block(1), "mlp/down_proj")["kernel"])


def test_replacing_a_block_unfinishes_it_first(tmp_path, monkeypatch):
    def killed(path):
        (path / "arrays/_METADATA").unlink(missing_ok=True)
        raise KeyboardInterrupt

    writer = CheckpointWriter(tmp_path / "c")
    writer.write_block(0, tiny.random_block(0))
    monkeypatch.setattr("gptvq_jax.storage.tree_io.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.write_block(0, tiny.random_block(1))
    assert writer.finished_blocks() == 0


def test_killed_process_leaves_whole_blocks(tmp_path):
    program = (
        "import itertools, tiny_checkpoint as tiny\n"
        f"writer = tiny.CheckpointWriter({str(tmp_path / 'c')!r})\n"
        "for index in itertools.count(): writer.write_block(index, tiny.random_block(index))\n"
    )
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent)])
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}
    )
    writer = CheckpointWriter(tmp_path / "c")
    while writer.finished_blocks() < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()

    finished = writer.finished_blocks()
    for index in range(finished):
        written = tiny.random_block(index)
        expected = {**written, **{norm: tiny.half(written[norm]) for norm in NORMS}}
        tiny.assert_same_tree(stored_block(tmp_path / "c", index), expected)
    writer.write_block(finished, tiny.random_block(0))
    assert writer.finished_blocks() == finished + 1


def test_unfinished_checkpoint_is_refused(copy):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint directory .*nowhere"):
        PackedCheckpoint(copy / "nowhere")
    CheckpointWriter(copy).write_block(1, tiny.random_block(1))  # no longer as the manifest says
    with pytest.raises(FileNotFoundError, match=r"manifest\.json is missing.* same --workdir"):
        PackedCheckpoint(copy)


def test_what_is_given_in_place_of_a_checkpoint_is_named(copy, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="of another format; pass it as --model"):
        PackedCheckpoint(tmp_path / "run")
    (tmp_path / "run/checkpoint").symlink_to(copy)
    with pytest.raises(FileNotFoundError, match="work directory of a run; pass .*run/checkpoint"):
        PackedCheckpoint(tmp_path / "run")
    (copy / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="did not finish"):
        PackedCheckpoint(tmp_path / "run")


@pytest.mark.parametrize("part", ["outer", "blocks/00001", "tokenizer"])
def test_finalize_needs_every_part(copy, part):
    shutil.rmtree(copy / part)
    name = {"blocks/00001": "layers_1"}.get(part, part)
    with pytest.raises(ValueError, match=f"lacks (the )?{name}"):
        CheckpointWriter(copy).finalize({}, tiny.MODEL, "tiny", "0123")


def test_finalize_refuses_what_is_not_json(copy):
    before = (copy / "manifest.json").read_bytes()
    for value in (float("nan"), np.float32(1)):
        with pytest.raises(ValueError, match=r"manifest\.json must hold finite JSON types"):
            CheckpointWriter(copy).finalize({"x": value}, tiny.MODEL, "tiny", "0123")
    assert (copy / "manifest.json").read_bytes() == before


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write to .*file/c: Not a directory; choose"):
        CheckpointWriter(tmp_path / "file/c")


# --- damage ---


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_damaged_file_is_found(copy, damage):
    block = copy / "blocks/00001"
    file = max(block.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.unlink()
    if damage != "missing":
        file.write_bytes(content if damage == "changed" else content[: len(content) // 2])
    PackedCheckpoint(copy).packed_block(0)
    with pytest.raises(
        ValueError, match=rf"00001 is damaged at {DATA_FILE}: .*{damage}.*; restore"
    ):
        PackedCheckpoint(copy).packed_block(1)


def test_changed_array_is_found_by_its_sum(copy, tmp_path):
    block, record = copy / "blocks/00001", read_record(copy / "blocks/00001")
    damaged = ocp.load(block / "arrays")
    damaged["mlp"]["up_proj"]["kernel"]["codes"][0, 2, 3] ^= 1
    missing = ocp.load(block / "arrays")
    del missing["mlp"]["up_proj"]
    for arrays, why in ((damaged, "its SHA-256"), (missing, "missing")):
        shutil.rmtree(block / "arrays")
        ocp.save(block / "arrays", arrays)
        write_json(block / "record.json", record | {"files": {}})
        with pytest.raises(ValueError, match=f"00001 is damaged at mlp/up_proj/kernel: {why}"):
            PackedCheckpoint(copy).packed_block(1)


def test_block_of_another_run_is_found(copy):
    other = with_layer(
        tiny.random_block(1),
        "mlp/up_proj",
        get_layer(tiny.random_block(5), "mlp/up_proj")["kernel"],
    )
    save_tree(copy / "blocks/00001", other, "float16")
    with pytest.raises(ValueError, match=r"layers_1/mlp/up_proj in .* comes from another run"):
        PackedCheckpoint(copy).block(1)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"format_version": 4}, "format_version=4, but this gptvq_jax reads 1, 2 and 3"),
        ({"format": "gguf"}, "is not the manifest of a gptvq_jax checkpoint"),
    ],
)
def test_foreign_manifest_is_refused(copy, edit, message):
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(ValueError, match=message):
        PackedCheckpoint(copy)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        PackedCheckpoint(copy)
