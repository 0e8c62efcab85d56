"""Checkpoints and tensors that somebody altered, and what reading and multiplying may do with them.

Every example ends in one of two ways: one line that names the checkpoint, within seconds, or
exactly the arrays that were written. As a program, this file runs examples on kernels that are
compiled with AddressSanitizer; it needs libasan in LD_PRELOAD.

    python tests/fuzz_checkpoint.py CACHE EXAMPLES
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import tiny_checkpoint as tiny
from flax import traverse_util
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.core.vq_tensor import VQTensor
from gptvq_jax.ops.cpu import build
from gptvq_jax.ops.vq_matmul import VQKernel, vq_matmul
from gptvq_jax.serve.params import packed_params
from gptvq_jax.storage import manifest
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.tensor_io import digest, tensor_to_state
from gptvq_jax.storage.tree_arrays import file_sums
from gptvq_jax.storage.tree_record import quantized_meta
from gptvq_jax.study.sample_tensors import TensorFormat, random_tensor

USER_ERRORS = (ValueError, NotImplementedError, OSError)
SECONDS = 5
SETTINGS = dict(
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.generate],
)
SANITIZE = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g0")

ONE_BLOCK = dataclasses.replace(tiny.MODEL, num_hidden_layers=1)
TREES = {"outer": "", "blocks/00000": "layers_0/"}
# In place of a field. The last ones are no JSON, or more than a reader can take.
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    8,
    255,
    2**31,
    2**63,
    10**30,
    0.5,
    1e300,
    "",
    "x",
    "..",
]
VALUES += ["dense", "factored", "uint8[1,2,3]", "float16[99999999999]", "0" * 64, "a\nb", "\ud800"]
VALUES += [[], {}, [1], {"a": 1}]
TEXTS = ["NaN", "-Infinity", "1e400", "9" * 5000, "[" * 100_000, '{"a":' * 5000, "", "tru", "\0"]
MARK = "the mark of what is to be replaced"


@functools.cache
def template(embeddings: str) -> Path:
    """A whole checkpoint of one block with every kind of layer."""
    directory = Path(tempfile.mkdtemp(prefix="gptvq-fuzz-"))
    return tiny.write_checkpoint(directory / "checkpoint", ONE_BLOCK, embeddings)


@functools.cache
def stored_trees(embeddings: str, multiply: bool) -> dict:
    """What its readers return; compiles what the examples run, which are timed."""
    return serve(template(embeddings), multiply)


def serve(directory: Path, multiply: bool = True) -> dict:
    """Reads a checkpoint, prepares it, and multiplies once with each layer."""
    checkpoint = PackedCheckpoint(directory)
    checkpoint.packed_outer = functools.cache(checkpoint.packed_outer)
    checkpoint.packed_block = functools.cache(checkpoint.packed_block)
    chosen = "auto" if multiply else "xla"  # which takes all and compiles nothing
    kernels = jax.tree.leaves(packed_params(checkpoint, chosen), is_leaf=is_kernel)
    for kernel in filter(is_kernel, kernels) if multiply else ():
        np.asarray(jnp.ones((1, kernel.shape[0])) @ kernel)
    return {"outer": checkpoint.packed_outer(), "blocks/00000": checkpoint.packed_block(0)}


def outcome(directory: Path, expected: dict, multiply: bool = True) -> str | None:
    """The error's line, or None where a checkpoint gives what is expected."""
    start, line = time.monotonic(), None
    try:
        found = serve(directory, multiply)
    except USER_ERRORS as error:
        line = str(error)
        assert len(line.splitlines()) == 1 and str(directory) in line, line
        assert len(line) < 5000, line[:1000]
    else:
        for name, tree in expected.items():
            tiny.assert_same_tree(found[name], tree)
    seconds = time.monotonic() - start
    assert seconds < SECONDS, f"{seconds:.1f} s: {line}"
    return line


def is_kernel(leaf) -> bool:
    return isinstance(leaf, VQKernel)


def run_example(draw, multiply: bool = True) -> str | None:
    """Alters a checkpoint as `draw` says, and reads it."""
    embeddings = draw(st.sampled_from(["int8", "dense"]))
    expected = dict(stored_trees(embeddings, multiply))
    with tempfile.TemporaryDirectory() as scratch:
        directory = shutil.copytree(template(embeddings), Path(scratch) / "c")
        alter = draw(st.sampled_from([alter_field, alter_field, alter_arrays, alter_file]))
        expected |= alter(draw, directory, expected) or {}
        return outcome(directory, expected, multiply)


# --- descriptions ---


def alter_field(draw, directory: Path, expected: dict) -> dict | None:
    """Replaces, removes, adds, repeats or renames one field of a record or of the manifest."""
    name = draw(st.sampled_from(["manifest.json", *(f"{tree}/record.json" for tree in TREES)]))
    path = directory / name
    content = json.loads(path.read_text())
    parent, key = draw(st.sampled_from(fields_of(content)))
    text = alter_one(draw, content, parent, key)
    path.write_text(text)
    if name != "manifest.json" and draw(st.booleans()):
        tree = name.removesuffix("/record.json")
        mirror(directory, TREES[tree], text)
        return {tree: with_unseen(expected[tree], content, parent, key)}
    return None


# Fields that no array tells, and the part of a tensor that has them: 27 and 25 rows need the arrays
# of twice 26, and a trellis of longer windows those of a shorter one.
UNSEEN = {
    "strip_rows": "grid",
    "strip_cols": "grid",
    "block_size": "block_scales",
    "window_bits": "",
}


def with_unseen(tree: dict, record: dict, parent, key) -> dict:
    """`tree` with such a field as a whole checkpoint, manifest and all, tells it of a layer."""
    if key not in UNSEEN:
        return tree
    flat, part = traverse_util.flatten_dict(tree, sep="/"), UNSEEN[key]
    for name, meta in record["quantized"].items():
        if parent is (meta.get(part) if part else meta):
            with contextlib.suppress(KeyError, TypeError, ValueError):  # which the reader refuses
                flat[name] = with_field(flat[name], part, key, parent[key])
    return traverse_util.unflatten_dict(flat, sep="/")


def with_field(tensor: QuantizedTensor, part: str, field: str, value) -> QuantizedTensor:
    """With a field of it, or of a part of it, that is another."""
    if not part:
        return dataclasses.replace(tensor, **{field: value})
    inner = dataclasses.replace(getattr(tensor, part), **{field: value})
    return dataclasses.replace(tensor, **{part: inner})


def fields_of(value, fields=None) -> list:
    """Every (dict or list, key) below a value."""
    fields = [] if fields is None else fields
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, below in items:
        fields.append((value, key))
        if isinstance(below, (dict, list)):
            fields_of(below, fields)
    return fields


def alter_one(draw, content: dict, parent, key) -> str:
    """The text of `content` after one change at parent[key]."""
    how = draw(st.sampled_from(["value", "value", "number", "text", "remove", "repeat", "rename"]))
    if how == "number" and type(parent[key]) is int:
        parent[key] = draw(st.sampled_from([-1, 1, 2, 7, 2**20, 2**40])) + parent[key]
    elif how == "value" or how == "number":
        parent[key] = draw(st.sampled_from(VALUES))
    elif how == "text":
        parent[key] = MARK
        return json.dumps(content).replace(f'"{MARK}"', draw(st.sampled_from(TEXTS)))
    elif how == "remove":
        del parent[key]
    elif isinstance(parent, dict):
        value = parent[key] if how == "repeat" else parent.pop(key)
        parent[MARK] = value
        names = [json.dumps(key)] if how == "repeat" else ['"x"', '""', '"/a"', '"../b"', '"c//d"']
        return json.dumps(content).replace(f'"{MARK}"', draw(st.sampled_from(names)))
    return json.dumps(content)


def mirror(directory: Path, prefix: str, record: str) -> None:
    """Makes the manifest list what a record says, as far as it can be read."""
    path = directory / "manifest.json"
    content = json.loads(path.read_text())
    try:
        listed = manifest.listed(json.loads(record), prefix)
        for section, metas in listed.items():
            content[section] |= metas
        sections = {name: content[name] for name in ("layers", "embeddings", "dense")}
        content |= manifest.counts(sections)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return
    path.write_text(json.dumps(content))


# --- arrays ---


def alter_arrays(draw, directory: Path, expected: dict) -> dict | None:
    """Stores other arrays, with sums that are right; the description follows as far as drawn."""
    name = draw(st.sampled_from(sorted(TREES)))
    record = json.loads((directory / name / "record.json").read_text())
    flat = traverse_util.flatten_dict(expected[name], sep="/")
    leaf = draw(st.sampled_from(sorted(flat)))
    told = draw(st.sampled_from(["files", "sums", "shapes", "all", "all"]))
    whole = told == "all" and isinstance(flat[leaf], QuantizedTensor) and draw(st.booleans())
    if whole and name != "outer":  # a tensor that exists, of this shape or another
        kind = draw(st.sampled_from(tiny.KINDS))
        rows, cols = flat[leaf].shape
        flat[leaf] = tiny.random_tensor(kind, rows + draw(st.sampled_from([0, 0, 0, 1])), cols, 3)
        arrays, _ = tensor_to_state(flat[leaf])
        record["quantized"][leaf] = quantized_meta(flat[leaf], digest(arrays))
    else:
        arrays = flat[leaf]
        if isinstance(arrays, QuantizedTensor):
            arrays, _ = tensor_to_state(arrays)
            part = draw(st.sampled_from(sorted(arrays)))
            arrays = arrays | {part: other_array(draw, arrays[part], list(arrays.values()))}
            describe_again(draw, record["quantized"][leaf], arrays, told)
        else:
            arrays = other_array(draw, arrays, list(flat.values()))
            describe_again(draw, record["dense"][leaf], {"": arrays}, told)
    store(directory, name, flat | {leaf: arrays}, record, mirrored=told == "all")
    return {name: with_arrays(expected[name], leaf, flat[leaf], arrays)}


def store(directory: Path, name: str, flat: dict, record: dict, mirrored: bool = True) -> None:
    """Stores a tree whose leaves may be anything, with the sums of its files in `record`."""
    stored = {
        n: tensor_to_state(v)[0] if isinstance(v, QuantizedTensor) else v for n, v in flat.items()
    }
    shutil.rmtree(directory / name / "arrays")
    ocp.save(directory / name / "arrays", traverse_util.unflatten_dict(stored, sep="/"))
    record["files"] = file_sums(directory / name)
    text = json.dumps(record)
    (directory / name / "record.json").write_text(text)
    if mirrored:
        mirror(directory, TREES[name], text)


def other_array(draw, array: np.ndarray, others: list) -> np.ndarray:
    """Cut, enlarged, of other values, of another dtype or shape, or another array altogether."""
    how = draw(st.sampled_from(["cut", "enlarge", "axis", "values", "dtype", "swap", "nan"]))
    axis = draw(st.integers(0, array.ndim - 1))
    if how == "cut" and array.shape[axis] > 1:
        return np.ascontiguousarray(np.delete(array, -1, axis))
    if how == "enlarge":
        return np.concatenate([array, array], axis)
    if how == "axis":
        return array[None] if draw(st.booleans()) else array.reshape(-1)
    if how == "dtype":
        kind = draw(st.sampled_from(["uint8", "int8", "float16", "float32", "int32", "bool"]))
        return array.astype(kind)
    if how == "swap":
        others = [other for other in others if isinstance(other, np.ndarray)]
        return others[draw(st.integers(0, len(others) - 1))]
    if how == "nan" and array.dtype.kind == "f":
        changed = array.copy()
        changed.flat[0] = draw(st.sampled_from([np.nan, np.inf, -np.inf, 60000]))
        return changed
    return np.ascontiguousarray(array[::-1])


def describe_again(draw, meta: dict, arrays: dict, told: str) -> None:
    """Lets a description follow its arrays: their sum, their shapes, what is counted from them."""
    if told != "files":
        meta["sha256"] = digest(arrays)
    if told not in ("shapes", "all"):
        return
    meta["num_bytes"] = sum(array.nbytes for array in arrays.values())
    if "arrays" not in meta:
        meta |= {"shape": list(arrays[""].shape), "dtype": arrays[""].dtype.name}
        return
    for name, array in arrays.items():
        meta["arrays"][name] = f"{array.dtype.name}[{','.join(map(str, array.shape))}]"
    meta["bits_per_value"] = 8 * meta["num_bytes"] / (meta["shape"][0] * meta["shape"][1])
    if draw(st.booleans()):  # and a field that the arrays may or may not fit
        parent, key = draw(st.sampled_from(fields_of(meta)))
        if type(parent[key]) is int:
            parent[key] += draw(st.sampled_from([-1, 1, 2, 7]))


def with_arrays(tree: dict, name: str, leaf, arrays) -> dict:
    """What a reader should return where it accepts these arrays for a leaf."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    if isinstance(leaf, QuantizedTensor):
        for path, array in arrays.items():
            part, _, field = path.rpartition(".")
            leaf = with_field(leaf, part, field, array)
    else:
        leaf = arrays
    return traverse_util.unflatten_dict(flat | {name: leaf}, sep="/")


# --- files ---


def alter_file(draw, directory: Path, expected: dict) -> None:
    """Damages a file of Orbax's, and records its sum; or bytes of a description."""
    files = [directory / name for name in files_of(directory)]
    path = files[draw(st.integers(0, len(files) - 1))]
    content = bytearray(path.read_bytes())
    how = draw(st.sampled_from(["flip", "flip", "cut", "grow", "remove", "swap", "pipe", "link"]))
    position = draw(st.integers(0, max(0, len(content) - 1)))
    if how == "flip" and content:
        for at in (position, draw(st.integers(0, len(content) - 1))):
            content[at] = draw(st.integers(0, 255))
    elif how == "cut":
        del content[position:]
    elif how == "grow":
        content += bytes(draw(st.sampled_from([1, 100, 2**16])))
    elif how == "swap":
        content = files[draw(st.integers(0, len(files) - 1))].read_bytes()
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "link":
        path.symlink_to(draw(st.sampled_from(["/dev/zero", "..", path.name, "/nowhere"])))
    elif how != "remove":
        path.write_bytes(content)
    for tree in TREES:
        record = directory / tree / "record.json"
        if path.is_relative_to(directory / tree / "arrays"):
            described = json.loads(record.read_text())
            described["files"] = file_sums(directory / tree)
            record.write_text(json.dumps(described))


def files_of(directory: Path) -> list[str]:
    """All but the tokenizer's; the longest names, which are random, in the order of their sizes."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    files = [path for path in files if path.parent.name != "tokenizer"]
    order = {path: (path.parent, path.stat().st_size, path.name) for path in files}
    return [str(path.relative_to(directory)) for path in sorted(files, key=order.get)]


# --- tensors at the kernels' door ---

FORMATS = [
    TensorFormat(dim, bits, group_size, 24, codebook_bits, rank, books, scale, row_scales)
    for dim, bits, group_size, codebook_bits, rank, books, scale, row_scales in [
        (1, 3, 64, 8, 0, 1, 0, False),
        (2, 5, 64, 8, 0, 1, 0, True),
        (2, 4, 0, 4, 0, 2, 0, False),
        (4, 8, 0, 8, 0, 2, 0, False),
        (8, 8, 0, 16, 0, 1, 0, True),
        (4, 7, 64, 16, 0, 1, 8, False),
        (1, 6, 64, 8, 2, 1, 8, False),
        (2, 2, 64, 4, 0, 1, 0, False),
        (16, 11, 0, 16, 0, 1, 0, False),
    ]
]
SIZES = [(1, 1), (5, 7), (13, 43), (9, 64), (33, 129)]


def random_case(draw) -> VQTensor:
    fmt, (rows, cols) = draw(st.sampled_from(FORMATS)), draw(st.sampled_from(SIZES))
    return random_tensor(fmt, fmt.grid(rows, cols), draw(st.integers(0, 99)))


def alter_tensor(draw, tensor: VQTensor) -> VQTensor:
    """One array or one static field of it is another."""
    arrays, _ = tensor_to_state(tensor)
    static = [("grid", f.name) for f in dataclasses.fields(GroupGrid)] + [("", "index_bits")]
    for part in ("codebook", "block_scales"):
        inner = getattr(tensor, part)
        if inner is not None:
            names = (f.name for f in dataclasses.fields(inner) if f.metadata.get("static"))
            static += [(part, name) for name in names]
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(arrays)))
        part, _, field = name.rpartition(".")
        value = other_array(draw, arrays[name], list(arrays.values()))
    else:
        part, field = draw(st.sampled_from(static))
        old = getattr(getattr(tensor, part) if part else tensor, field)
        value = draw(st.sampled_from([old + 1, old * 2, old - 1, -old, 2**40, old + 0.5]))
    return with_field(tensor, part, field, value)


def multiply(tensor: VQTensor, cols: int) -> None:
    """By every kernel of this platform: they agree, or none takes it; `cols` inputs."""
    results = {}
    for name in ("xla", "cpu", "cpu_int8"):
        for batch in (1, 3):
            x = np.random.default_rng(batch).normal(size=(batch, cols))
            try:
                y = vq_matmul(jnp.float32(x), tensor, implementation=name)
            except NotImplementedError as error:
                assert len(str(error).splitlines()) == 1
                continue
            results[name, batch] = np.asarray(y)
    for (name, batch), y in results.items():
        right = results["xla", batch]
        tolerance = 3e-2 if name == "cpu_int8" else 1e-4
        if np.isfinite(right).all():
            assert np.linalg.norm(y - right) <= tolerance * np.linalg.norm(right) + 1e-6, name


def run_tensor_example(draw) -> bool:
    """Multiplies by a tensor, altered or not; whether it was taken."""
    tensor, altered = random_case(draw), draw(st.integers(0, 3)) > 0
    try:
        # The inputs of the unaltered tensor: what an altered one says of its columns may be absurd.
        multiply(alter_tensor(draw, tensor) if altered else tensor, tensor.shape[1])
    except ValueError as error:
        assert altered and len(str(error).splitlines()) == 1, error
        return False
    return True


def fuzz(example, count: int) -> list:
    """What `count` examples returned, always the same ones."""
    results = []

    @hypothesis.settings(max_examples=count, derandomize=True, **SETTINGS)
    @hypothesis.given(st.data())
    def run(data):
        results.append(example(data.draw))

    run()
    return results


def sanitized(cache: str, examples: int) -> None:
    """Runs examples of both kinds on kernels that AddressSanitizer watches."""
    compile_kernels = build.build
    build.build = lambda *_: compile_kernels(Path(cache), SANITIZE)
    print(build.library()._name)
    taken = fuzz(run_tensor_example, examples)
    lines = fuzz(run_example, examples)
    print(f"{sum(taken)} of {len(taken)} tensors and {lines.count(None)} of {len(lines)} taken")


if __name__ == "__main__":
    sanitized(sys.argv[1], int(sys.argv[2]))
