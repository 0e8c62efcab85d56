"""Checkpoints that somebody made to do harm: one line each, before anything is done with them."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import fuzz_checkpoint as fuzz
import numpy as np
import pytest
import tensorstore as ts
import tiny_checkpoint as tiny
from flax import traverse_util

from gptvq_jax.console.json_file import read_own_object
from gptvq_jax.models.hf_directory import HFDirectory
from gptvq_jax.ops.cpu import build
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.tensor_io import digest, tensor_to_state
from gptvq_jax.storage.tree_arrays import file_sums
from gptvq_jax.storage.tree_io import load_tree
from gptvq_jax.storage.tree_record import quantized_meta
from gptvq_jax.study.sample_tensors import TensorFormat, random_tensor

_TESTS = Path(__file__).parents[1]
PYTHONPATH = os.pathsep.join(map(str, (_TESTS, _TESTS.parent)))

BLOCK, LAYER = "blocks/00000", "mlp/down_proj/kernel"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fuzz.template("int8")


@pytest.fixture
def copy(whole, tmp_path):
    return fuzz.shutil.copytree(whole, tmp_path / "checkpoint")


def refused(directory, match):
    """Opening or reading it ends in one line."""
    with pytest.raises((ValueError, NotImplementedError), match=match) as error:
        checkpoint = PackedCheckpoint(directory)
        checkpoint.packed_outer()
        checkpoint.packed_block(0)
    assert len(str(error.value).splitlines()) == 1
    assert str(directory) in str(error.value)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def describe_layer(directory, change):
    """Changes the description of a layer in its record, and in the manifest as well."""
    record = directory / BLOCK / "record.json"
    edit(record, lambda content: change(content["quantized"][LAYER]))
    fuzz.mirror(directory, "layers_0/", record.read_text())


def store_layer(directory, leaf, meta=None, name=LAYER, tree=BLOCK):
    """Stores other arrays for a leaf, with every sum right and listed in the manifest."""
    record = json.loads((directory / tree / "record.json").read_text())
    flat = traverse_util.flatten_dict(load_tree(directory / tree)[0], sep="/")
    arrays = tensor_to_state(leaf)[0] if meta is None else leaf
    record["quantized"][name] = meta or quantized_meta(leaf, digest(arrays))
    record["dense"].pop(name, None)
    fuzz.store(directory, tree, flat | {name: arrays}, record)


# --- descriptions ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Each is at one with its arrays' description, and was believed.
        (lambda m: m["grid"].update(strip_rows=1), "codebook.centroids must be"),
        (lambda m: m["grid"].update(strip_cols=4), "codebook.centroids must be"),
        (lambda m: m["grid"].update(strip_cols=2**40), "grid.strip_cols=1099511627776 must be"),
        (lambda m: m["grid"].update(strip_rows=10**6), "grid.strip_rows=1000000 must be at most"),
        (lambda m: m["grid"].update(cols=2**31 - 1), "centroids are more than 2147483647"),
        (lambda m: m.update(index_bits=16), "codebook_size=32 must be 65536"),
        (lambda m: m["codebook"].update(codebook_size=4), "codebook_size=4 must be 32"),
        (lambda m: m["codebook"].update(dim=1), "codebook.dim=1 must be"),
        (lambda m: m.update(shape=[36, 53]), r"shape is \[36, 53\], but the rest makes it"),
        (lambda m: m.update(num_bytes=True), "num_bytes is True, but the rest makes it"),
        (lambda m: m.update(bits_per_value=1e300), "bits_per_value is 1e.300"),
        (lambda m: m.update(index_bits=5.0), "index_bits=5.0 must be an integer"),
        (lambda m: m.update(extra=1), "the field 'extra' is unknown"),
        (lambda m: m.update(block_scales={}), "block_scales={} must be an object of block_size"),
        (lambda m: m.update(sha256=None), "sha256=None must be 64 hexadecimal digits"),
        (lambda m: m["arrays"].update(codes="uint8[9999,9999,9999,9999]"), "codes must have 3"),
        (lambda m: m["arrays"].update({"block_scales.step": "float16[2]"}), "has no place for the"),
    ],
)  # fmt: skip
def test_a_description_that_cannot_be_true_is_refused(copy, change, message):
    describe_layer(copy, change)
    refused(copy, message)


@pytest.mark.parametrize("name", ["manifest.json", "outer/record.json", f"{BLOCK}/record.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000, "nested too deep"),
        ('{"a": ' * 200_000, "nested too deep"),
        ('{"format_version": NaN}', "'NaN' is not a finite number"),
        ('{"format_version": 1e999}', "'1e999' is not a finite number"),
        ('{"format_version": 2, "format_version": 2}', "'format_version' occurs twice"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ("[]", r"it holds \[\], not an object"),
        ("\xff", "codec can't decode|Expecting value"),
        ("", "Expecting value"),
    ],
)
def test_a_description_is_one_json_object(copy, name, text, message):
    (copy / name).write_bytes(text.encode("latin-1"))
    refused(copy, message)


def test_a_description_larger_than_any_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr("gptvq_jax.console.json_file.MAX_BYTES", 100)
    (tmp_path / "record.json").write_text(f'{{"a": "{"x" * 100}"}}')
    with pytest.raises(ValueError, match="more than 100 bytes"):
        read_own_object(tmp_path / "record.json")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "arrays/../../x", "../x", "record.json", "arrays/..\\x", "arrays/\0"]
)
def test_a_record_lists_files_of_its_own_arrays(copy, path):
    edit(copy / BLOCK / "record.json", lambda r: r["files"].update({path: "0" * 64}))
    refused(copy, "must be a path below arrays/")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../up", r"'\.\./up'"),
        ("/up", "has an empty part"),
        ("mlp//up", "has an empty part"),
        (f"{LAYER}/codes", "lies within another"),
    ],
)
def test_a_record_lists_leaves_of_the_model(copy, name, message):
    def rename(record):
        record["quantized"][name] = record["quantized"]["mlp/up_proj/kernel"]

    edit(copy / BLOCK / "record.json", rename)
    refused(copy, message)


# --- the model ---


def remove_layer(manifest):
    del manifest["layers"]["layers_0/mlp/down_proj"]


def rename_layer(manifest):
    manifest["layers"]["layers_1/mlp/down_proj"] = manifest["layers"].pop("layers_0/mlp/down_proj")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["model"].update(num_hidden_layers=10**12), "num_hidden_layers must be a pos"),
        (lambda m: m["model"].update(num_hidden_layers=10**4), "10000 blocks do not have"),
        (lambda m: m["model"].update(hidden_size=2**40), "hidden_size must be a positive integer"),
        (lambda m: m["model"].update(hidden_size=2**30), "has shape"),
        (lambda m: m["model"].update(vocab_size=39), "embed_tokens/embedding has shape"),
        (lambda m: m.update(model=[]), r"model=\[\] must be an object"),
        (lambda m: m.update(config="x"), "config='x' must be an object"),
        (lambda m: m["source"].update(name=3), "source.name=3 must be a string"),
        (lambda m: m.update(quantized_bytes=1), "quantized_bytes is 1, but what is listed makes"),
        (lambda m: m.update(more=1), "the field 'more' is unknown"),
        (lambda m: m.pop("dense"), "the field 'dense' is missing"),
        (remove_layer, "1 blocks do not have"),
        (rename_layer, "layers_0/mlp/down_proj/kernel is missing"),
        (lambda m: m["embeddings"].update(x=m["embeddings"].pop("lm_head")), "'x' is not an embe"),
    ],
)  # fmt: skip
def test_a_manifest_lists_the_weights_of_its_model(copy, change, message):
    edit(copy / "manifest.json", change)
    refused(copy, message)


@pytest.mark.parametrize("shape", [(36, 53), (52, 36), (1, 1)])
def test_a_layer_of_another_shape_is_named(copy, shape):
    store_layer(copy, tiny.random_tensor("int8", *shape))
    refused(copy, r"manifest\.json is damaged: layers_0/mlp/down_proj/kernel has shape \[")


def test_a_layer_of_another_shape_is_named_where_the_manifest_is_right(copy):
    manifest = (copy / "manifest.json").read_bytes()
    store_layer(copy, tiny.random_tensor("int8", 36, 53))
    (copy / "manifest.json").write_bytes(manifest)
    refused(copy, r"00000 is not of the model .*mlp/down_proj/kernel has shape \[36, 53\]")


def test_an_embedding_has_rows_that_can_be_looked_up(copy):
    name, shape = "embed_tokens/embedding", (40, 36)
    store_layer(copy, tiny.random_tensor("trellis", *shape), name=name, tree="outer")
    refused(copy, "embed_tokens/embedding: trellis codes have no rows that can be looked up")


@pytest.mark.parametrize(
    "names, message",
    [
        ("layers_0/mlp/up_proj", "kept_dense='layers_0/mlp/up_proj' must be a list of names"),
        ([3], r"kept_dense=\[3\] must be a list of names"),
        (["layers_0/mlp/up_proj"], "kept_dense: 'layers_0/mlp/up_proj' is no dense layer"),
        (["layers_0/input_layernorm/scale"], "is no dense layer"),
        (["lm_head"], "kept_dense: 'lm_head' is no dense layer"),
    ],
)
def test_layers_that_count_as_dense_are_dense_layers(copy, names, message):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "kept_dense": names}))
    refused(copy, message)


# --- arrays ---


def test_arrays_fit_each_other_though_every_sum_is_right(copy):
    tensor = load_tree(copy / BLOCK)[0]["mlp"]["up_proj"]["kernel"]
    arrays, _ = tensor_to_state(tensor)
    cut = arrays | {"codebook.centroids": arrays["codebook.centroids"][:, :1]}
    meta = quantized_meta(tensor, digest(cut))
    meta["num_bytes"] = sum(array.nbytes for array in cut.values())
    meta["bits_per_value"] = 8 * meta["num_bytes"] / (52 * 36)
    shape = cut["codebook.centroids"].shape
    meta["arrays"]["codebook.centroids"] = f"float16[{','.join(map(str, shape))}]"
    store_layer(copy, cut, meta, "mlp/up_proj/kernel")
    refused(copy, "codebook.centroids must be")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scale_that_is_not_finite_is_named(copy, value):
    tensor = tiny.random_tensor("int8", 36, 52)
    tensor.codebook.scale[0, 0, 0] = value
    store_layer(copy, tensor)
    refused(copy, "at mlp/down_proj/kernel: codebook.scale contains NaN or Inf")


def test_streams_that_are_cut_short_are_refused_also_by_a_script(copy):
    tensor = tiny.random_tensor("trellis", 36, 52)
    store_layer(copy, dataclasses.replace(tensor, codes=tensor.codes[:-1]))
    refused(copy, r"mlp/down_proj/kernel: codes has \d+ bytes, the rates make it \d+")
    line = [sys.executable, _TESTS.parent / "scripts/export.py", f"--checkpoint={copy}"]
    line += ["--format=hf-dense", f"--output={copy.parent / 'export'}"]
    done = subprocess.run(line, capture_output=True, text=True)
    *bars, line = done.stderr.splitlines()
    assert done.returncode == 1 and all("export:" in bar for bar in bars if bar), done.stderr
    assert line.startswith("error: ") and "codes has" in line


def test_trellis_codes_of_another_table_are_refused(copy):
    store_layer(copy, tiny.random_tensor("trellis", 36, 52))
    describe_layer(copy, lambda meta: meta.update(table=2))
    refused(copy, "table=2 is not 1, .* quantize again")


def test_arrays_that_would_fill_the_memory_are_refused_before_they_are_made(copy):
    """A thousand million bytes of zeros, which no file has to hold."""
    path = copy / BLOCK / "arrays/state"
    fmt = TensorFormat(dim=2, index_bits=16, codebook_bits=16)
    tensor = random_tensor(fmt, fmt.grid(36, 52))
    store_layer(copy, tensor)
    books = 4000

    def many(meta):
        meta["arrays"] = {
            "codes": f"uint8[{books},36,52]",
            "codebook.centroids": f"float16[{books},1,1,65536,2]",
        }
        meta["num_bytes"] = books * (36 * 52 + 65536 * 4)
        meta["bits_per_value"] = 8 * meta["num_bytes"] / (36 * 52)

    describe_layer(copy, many)
    enlarge(path, "mlp.down_proj.kernel.codes", [books, 36, 52])
    enlarge(path, "mlp.down_proj.kernel.codebook.centroids", [books, 1, 1, 65536, 2])
    rewrite_sums(copy)
    refused(copy, "bytes cannot hold 10560[0-9]+ bytes of arrays")


def enlarge(path, name, shape, chunk=None):
    """Rewrites what Orbax's files say of an array's shape, not its contents."""
    spec = {"driver": "ocdbt", "base": f"file://{path}/"}
    store = ts.KvStore.open(spec).result()
    key = f"{name}/zarr.json"
    meta = json.loads(store.read(key).result().value)
    meta["shape"] = shape
    if chunk:
        meta["chunk_grid"]["configuration"]["chunk_shape"] = chunk
        meta["codecs"][0]["configuration"]["chunk_shape"] = chunk
    store.write(key, json.dumps(meta)).result()


def rewrite_sums(directory):
    edit(
        directory / BLOCK / "record.json",
        lambda record: record.update(files=file_sums(directory / BLOCK)),
    )


@pytest.mark.parametrize(
    ("shape", "chunk", "message"),
    [
        ([2**20, 2**20, 2**10], None, r"is stored as uint8\[1048576,1048576,1024\], not as uint8"),
        ([1, 52, 14], [2**20, 2**20, 2**10], r"is stored in chunks of|Orbax"),
    ],
)
def test_files_of_orbax_say_what_the_record_says(copy, shape, chunk, message):
    tensor = load_tree(copy / BLOCK)[0]["mlp"]["up_proj"]["kernel"]
    shape = list(tensor.codes.shape) if chunk else shape
    enlarge(copy / BLOCK / "arrays/state", "mlp.up_proj.kernel.codes", shape, chunk)
    rewrite_sums(copy)
    refused(copy, message)


# --- files ---


def data_file(directory):
    return max((directory / BLOCK).rglob("d/*"), key=lambda path: path.stat().st_size)


def test_damage_is_found_behind_sums_that_are_right(copy, capfd):
    # All of them: which ones Orbax reads differs from one time to the next.
    contents = {path: path.read_bytes() for path in (copy / BLOCK).rglob("d/*")}
    for cut in (lambda n: 0, lambda n: min(n, 10), lambda n: n // 2, lambda n: n - 1):
        for path, content in contents.items():
            path.write_bytes(content[: cut(len(content))])
        rewrite_sums(copy)
        refused(copy, "00000 is damaged at arrays")
    assert capfd.readouterr() == ("", "")  # nothing beside that line


def test_pipes_and_links_of_directories_are_not_followed(copy):
    for path, make in (
        (data_file(copy), os.mkfifo),
        (copy / BLOCK / "arrays/state/more", lambda path: path.symlink_to("/proc")),
        (copy / BLOCK / "arrays/loop", lambda path: path.symlink_to(".")),
    ):
        path.unlink(missing_ok=True)
        make(path)
        refused(copy, "neither file nor folder")
        path.unlink()
    (copy / "manifest.json").unlink()
    os.mkfifo(copy / "manifest.json")
    with pytest.raises(FileNotFoundError, match=r"manifest\.json is missing"):
        PackedCheckpoint(copy)


def test_a_checkpoint_of_links_to_files_is_read(whole, tmp_path):
    """As in the cache of the Hugging Face hub."""
    for path in whole.rglob("*"):
        if path.is_file():
            link = tmp_path / "c" / path.relative_to(whole)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    expected = fuzz.stored_trees("int8", multiply=False)
    assert fuzz.outcome(tmp_path / "c", expected, multiply=False) is None


# --- safetensors ---


@pytest.mark.parametrize(
    "shard",
    ["/etc/passwd", "../x.safetensors", "a/../../x", "..\\x", "C:\\x", "a\0", "", 3, None, []],
)
def test_an_index_leads_to_files_of_its_directory(tmp_path, shard):
    (tmp_path / "config.json").write_text("{}")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(ValueError, match=r"index\.json") as error:
        _ = HFDirectory(tmp_path).files
    assert len(str(error.value).splitlines()) == 1


HEADER = {"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}


@pytest.mark.parametrize(
    ("length", "header"),
    [
        (2**63, HEADER),
        (10, HEADER),
        (None, {"a": HEADER["a"] | {"data_offsets": [0, 2**40]}}),
        (None, {"a": HEADER["a"] | {"data_offsets": [-1, 3]}}),
        (None, {"a": HEADER["a"], "b": HEADER["a"]}),
        (None, {"a": HEADER["a"] | {"dtype": "F99"}}),
        (None, {"a": HEADER["a"] | {"shape": [2**40, 2**40]}}),
        (None, []),
    ],
)
def test_a_damaged_header_of_safetensors_is_one_line(tmp_path, length, header):
    (tmp_path / "config.json").write_text("{}")
    text = json.dumps(header).encode()
    content = (length or len(text)).to_bytes(8, "little") + text + b"1234"
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete") as error:
        _ = HFDirectory(tmp_path).files
    assert len(str(error.value).splitlines()) == 1


# --- fuzzing ---


def test_altered_checkpoints_end_in_one_line_or_unaltered():
    lines = fuzz.fuzz(lambda draw: fuzz.run_example(draw, multiply=False), 20)
    assert None in lines and len(set(lines)) > 5


@pytest.mark.slow
def test_1000_altered_checkpoints_end_in_one_line_or_unaltered():
    lines = fuzz.fuzz(fuzz.run_example, 1000)
    assert len(lines) >= 1000
    assert lines.count(None) > 50 and len(set(lines)) > 150


@pytest.mark.slow
def test_kernels_touch_nothing_but_their_arrays(tmp_path):
    """150 tensors and as many checkpoints, with AddressSanitizer in the kernels."""
    compiler = build.find_compiler()
    libraries = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libubsan.so")
    ]
    paths = [done.stdout.strip() for done in libraries]
    if not all(Path(path).is_absolute() for path in paths):
        pytest.skip(f"{compiler} has no AddressSanitizer")
    build.build(tmp_path, fuzz.SANITIZE)  # here, because a compiler that is watched takes minutes
    settings = {"LD_PRELOAD": ":".join(paths), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, str(Path(fuzz.__file__)), str(tmp_path), "150"],
        env=os.environ | settings | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "tensors and" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["record", "manifest", "index", "safetensors", "gguf"])
def test_readers_under_atheris(reader):
    pytest.importorskip("atheris", reason="atheris is not installed")
    program = Path(__file__).with_name("fuzz_readers.py")
    done = subprocess.run(
        [sys.executable, str(program), reader, "-max_total_time=15"],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
