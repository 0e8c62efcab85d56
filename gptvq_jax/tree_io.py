"""One stored tree: a nested dict of arrays and VQTensors, with a description to check it by.

arrays/        Orbax
record.json    written last: its presence means complete
"""

import contextlib
import functools
import hashlib
import json
import operator
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from gptvq_jax import durable
from gptvq_jax.disk_space import check_room, is_full, naming_full_disk
from gptvq_jax.tensor_io import (
    FORMAT_VERSION,
    check_format_version,
    digest,
    state_to_tensor,
    tensor_to_state,
)
from gptvq_jax.vq_tensor import VQTensor

DENSE_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}

_RECORD = "record.json"

_ODD = frozenset("[*?\\")  # characters of a path that Orbax takes for something else

Tree = dict[str, Any]
Record = dict[str, Any]


class DamagedError(ValueError):
    """What is stored is not what was written."""


def save_tree(directory: Path, tree: Mapping[str, Any], dense_dtype: str) -> Record:
    """Writes a tree; until that is done, `directory` does not count as one.

    Whatever an interrupted run left there is replaced.

    Args:
      directory: to be created.
      tree: nested dict with strings as keys; a leaf is a VQTensor or an array.
      dense_dtype: key of DENSE_DTYPES, in which arrays are stored.

    Returns:
      The description stored with it: {"format_version", "quantized": {name: meta}, "dense":
      {name: meta}, "files": {path: sha256}}, where a name joins the keys by "/" and a meta holds at
      least shape, num_bytes and sha256 of the array or arrays.

    Raises:
      ValueError: a value is too large for `dense_dtype`.
      FullDiskError: there is no room; nothing is left in `directory` then.
    """
    stored, quantized, dense = {}, {}, {}
    for name, leaf in traverse_util.flatten_dict(tree, sep="/").items():
        if isinstance(leaf, VQTensor):
            stored[name], meta = tensor_to_state(leaf)
            counts = {"shape": list(leaf.shape), "num_bytes": leaf.num_bytes}
            counts |= {"bits_per_value": leaf.bits_per_value, "sha256": digest(stored[name])}
            quantized[name] = counts | meta
        else:
            array = stored[name] = cast_dense(leaf, dense_dtype, name)
            counts = {"shape": list(array.shape), "num_bytes": array.nbytes}
            dense[name] = counts | {"dtype": dense_dtype, "sha256": digest({"": array})}

    size = sum(array.nbytes for array in jax.tree.leaves(stored))
    check_room(directory, size)
    if directory.exists():
        (directory / _RECORD).unlink(missing_ok=True)  # first: a kill must not leave it alone
        durable.sync(directory)
        shutil.rmtree(directory)
    try:
        with naming_full_disk(directory, size):
            durable.make_directory(directory)
            with plain_path(directory) as plain, _threads_quiet_on_a_full_disk():
                ocp.save(plain / "arrays", traverse_util.unflatten_dict(stored, sep="/"))
            durable.sync_tree(directory)
            record = {
                "format_version": FORMAT_VERSION,
                "quantized": quantized,
                "dense": dense,
                "files": _file_sums(directory),
            }
            write_json(directory / _RECORD, record)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return record


def read_record(directory: Path) -> Record | None:
    """The description of a tree, without its arrays; None if `directory` is absent or unfinished.

    Raises:
      ValueError: it is damaged or of another format version.
    """
    path = directory / _RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(directory, _RECORD, str(error)) from error
    check_format_version(record.get("format_version"), str(path))
    return record


def load_tree(directory: Path) -> tuple[Tree, Record]:
    """Reads a tree of host arrays and VQTensors of host arrays, and its description.

    Raises:
      FileNotFoundError: there is no finished tree in `directory`.
      ValueError: it is damaged; the message names the directory and the layer.
    """
    record = read_record(directory)
    if record is None:
        raise FileNotFoundError(
            f"{directory} is missing or unfinished; rerun scripts/quantize.py with the same "
            "--workdir to complete it"
        )
    # Before Orbax reads them: what it says of a damaged file is long and does not name the block.
    _check_files(directory, record)
    with plain_path(directory) as plain:
        arrays = ocp.load(plain / "arrays")

    tree = {}
    for name, meta in (record["quantized"] | record["dense"]).items():
        try:
            leaf = functools.reduce(operator.getitem, name.split("/"), arrays)
        except (KeyError, TypeError) as error:
            raise _damaged(directory, name, "missing") from error
        packed = name in record["quantized"]
        if digest(leaf if packed else {"": leaf}) != meta["sha256"]:
            raise _damaged(directory, name, "its SHA-256 is not the one recorded")
        tree[name] = state_to_tensor(leaf, meta) if packed else leaf
    return traverse_util.unflatten_dict(tree, sep="/"), record


def is_stored(directory: Path) -> bool:
    """Whether a tree was written to its end; says nothing of what became of it since."""
    return (directory / _RECORD).exists()


def damage(directory: Path) -> str | None:
    """What is wrong with the files of a tree whose record is there; None if nothing is.

    Raises:
      ValueError: it is of another format version.
    """
    try:
        record = read_record(directory)
        if record is not None:
            _check_files(directory, record)
    except DamagedError as error:
        return str(error)
    return None


@contextlib.contextmanager
def _threads_quiet_on_a_full_disk() -> Iterator[None]:
    """Keeps Orbax's threads from printing a traceback of what it raises again in the caller."""
    before = threading.excepthook

    def quiet(args):
        if not is_full(args.exc_value):
            before(args)

    threading.excepthook = quiet
    try:
        yield
    finally:
        threading.excepthook = before


@contextlib.contextmanager
def plain_path(directory: Path) -> Iterator[Path]:
    """A path to `directory` that Orbax can take, for as long as the context lasts.

    Orbax looks for its files with a glob on their path, and its file driver takes a backslash for a
    slash. Such a directory is reached through a link in the temporary directory.
    """
    if not _ODD & set(str(directory)):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="gptvq-") as scratch:
        if _ODD & set(scratch):
            raise ValueError(
                f"{directory} has one of the characters {' '.join(sorted(_ODD))} in its name, and "
                f"so has the temporary directory {scratch}; set TMPDIR to another one"
            )
        link = Path(scratch) / "directory"
        link.symlink_to(directory.absolute(), target_is_directory=True)
        yield link


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a file that is whole or absent.

    Raises:
      ValueError: `value` is not made of finite JSON types.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold finite JSON types: {error}") from error
    durable.write_text(path, text)


def cast_dense(values: Any, dtype: str, name: str) -> np.ndarray:
    """Rounds an array to a storage dtype.

    Raises:
      ValueError: the dtype is not one of DENSE_DTYPES or a finite value overflows it.
    """
    check_dense_dtype(dtype)
    values = np.asarray(values)
    with np.errstate(over="ignore"):  # reported below, by name
        cast = values.astype(DENSE_DTYPES[dtype])
    overflow = np.isinf(cast) & np.isfinite(values)
    if overflow.any():
        peak = np.abs(values[overflow]).max()
        wider = "bfloat16" if dtype == "float16" else "float32"
        raise ValueError(f"{name} holds {peak:.3g}, too large for {dtype}; use {wider} instead")
    return cast


def check_dense_dtype(dtype: str) -> None:
    """Raises ValueError if `dtype` is not a key of DENSE_DTYPES."""
    if dtype not in DENSE_DTYPES:
        raise ValueError(f"{dtype=} must be one of {', '.join(DENSE_DTYPES)}")


def _check_files(directory: Path, record: Record) -> None:
    """Raises DamagedError unless the files are those whose sums are recorded."""
    found = _file_sums(directory)
    for path, sha256 in record["files"].items():
        if found.get(path) != sha256:
            raise _damaged(directory, path, "changed or truncated" if path in found else "missing")


def _file_sums(directory: Path) -> dict[str, str]:
    """{path below `directory`: SHA-256} of Orbax's files."""
    sums = {}
    for path in sorted(path for path in (directory / "arrays").rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            sums[str(path.relative_to(directory))] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _damaged(directory: Path, name: str, why: str) -> DamagedError:
    return DamagedError(
        f"{directory} is damaged at {name}: {why}; restore it from a copy, or quantize again in "
        "another --workdir"
    )
