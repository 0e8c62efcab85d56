"""One stored tree: a nested dict of arrays and VQTensors, with a description to check it by.

arrays/        Orbax
record.json    written last: its presence means complete
"""

import contextlib
import functools
import gc
import hashlib
import json
import logging
import operator
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from gptvq_jax.check_tensor import signature
from gptvq_jax.errors import brief, first_line
from gptvq_jax.json_file import read_json_object
from gptvq_jax.tensor_io import (
    FORMAT_VERSION,
    check_format_version,
    digest,
    state_to_tensor,
    tensor_to_state,
)
from gptvq_jax.tree_record import (
    DENSE_DTYPES,
    Record,
    arrays_of,
    check_record,
    dense_meta,
    quantized_meta,
)
from gptvq_jax.vq_tensor import VQTensor

_RECORD = "record.json"

# Bytes of arrays for each byte that is stored, beyond those that any tree may have: Orbax does
# compress, but no real weights so far.
_MAX_RATIO, _FREE_BYTES = 1024, 2**26
# For which reads that are under way when Orbax gives up are waited for, so that they say nothing.
_LATE_SECONDS = 0.1

Tree = dict[str, Any]


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
    """
    stored, quantized, dense = {}, {}, {}
    for name, leaf in traverse_util.flatten_dict(tree, sep="/").items():
        if isinstance(leaf, VQTensor):
            stored[name], _ = tensor_to_state(leaf)
            quantized[name] = quantized_meta(leaf, digest(stored[name]))
        else:
            array = stored[name] = cast_dense(leaf, dense_dtype, name)
            dense[name] = dense_meta(array.shape, dense_dtype, digest({"": array}))

    if directory.exists():
        (directory / _RECORD).unlink(missing_ok=True)  # first: a kill must not leave it alone
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    ocp.save(directory / "arrays", traverse_util.unflatten_dict(stored, sep="/"))
    record = {
        "format_version": FORMAT_VERSION,
        "quantized": quantized,
        "dense": dense,
        "files": _file_sums(directory),
    }
    write_json(directory / _RECORD, record)
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
        record = read_json_object(path)
    except ValueError as error:
        raise _damaged(directory, _RECORD, str(error)) from None
    check_format_version(record.get("format_version"), str(path))
    try:
        check_record(record)
    except ValueError as error:
        raise _damaged(directory, _RECORD, str(error)) from None
    return record


def finished_record(directory: Path) -> Record:
    """`read_record` of a tree that must be there.

    Raises:
      FileNotFoundError: there is no finished tree in `directory`.
      ValueError: see `read_record`.
    """
    record = read_record(directory)
    if record is None:
        raise FileNotFoundError(
            f"{directory} is missing or unfinished; rerun scripts/quantize.py with the same "
            "--workdir to complete it"
        )
    return record


def load_tree(directory: Path) -> tuple[Tree, Record]:
    """Reads a tree of host arrays and VQTensors of host arrays, and its description.

    Raises:
      FileNotFoundError: there is no finished tree in `directory`.
      ValueError: it is damaged; the message names the directory and the layer.
    """
    record = finished_record(directory)
    return load_arrays(directory, record), record


def load_arrays(directory: Path, record: Record) -> Tree:
    """Reads the tree that `record`, of this directory, describes.

    The files may be anyone's: nothing is allocated before it is known to be what the description
    says, and what is returned has passed `check_tensor` and `check_values`.

    Raises:
      ValueError: it is damaged; the message names the directory and the layer.
    """
    _check_files(directory, record)
    arrays = _read_arrays(directory, record)
    tree = {}
    for name, meta in (record["quantized"] | record["dense"]).items():
        leaf = functools.reduce(operator.getitem, name.split("/"), arrays)
        packed = name in record["quantized"]
        if digest(leaf if packed else {"": leaf}) != meta["sha256"]:
            raise _damaged(directory, name, "its SHA-256 is not the one recorded")
        try:
            tree[name] = state_to_tensor(leaf, meta) if packed else _finite(leaf)
        except ValueError as error:
            raise _damaged(directory, name, str(error)) from None
    return traverse_util.unflatten_dict(tree, sep="/")


def _check_files(directory: Path, record: Record) -> None:
    """Before Orbax reads them: what it says of a damaged file is long and names no block."""
    for path in (directory / "arrays").rglob("*"):
        # A pipe would be waited for; sums leave out what lies behind the link of a directory. Links
        # of files are followed: the cache of the Hugging Face hub is made of them.
        if not path.is_file() and (path.is_symlink() or not path.is_dir()):
            raise _damaged(directory, str(path.relative_to(directory)), "neither file nor folder")
    found = _file_sums(directory)
    for path, sha256 in record["files"].items():
        if found.get(path) != sha256:
            raise _damaged(directory, path, "changed or truncated" if path in found else "missing")


def _read_arrays(directory: Path, record: Record) -> Tree:
    """The nested dict of host arrays, once their own description agrees with the record."""
    path, expected = directory / "arrays", arrays_of(record)
    stored_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    metas = (record["quantized"] | record["dense"]).values()
    num_bytes = sum(meta["num_bytes"] for meta in metas)
    if num_bytes > _FREE_BYTES + _MAX_RATIO * stored_bytes:
        raise _damaged(
            directory, _RECORD, f"{stored_bytes} bytes cannot hold {num_bytes} bytes of arrays"
        )
    _check_arrays(directory, _orbax(directory, _description, path), expected)
    arrays = _orbax(directory, _contents, path)
    _check_arrays(directory, arrays, expected)
    return arrays


def _check_arrays(directory: Path, arrays: Tree, expected: dict[tuple[str, ...], str]) -> None:
    """Compares a nested dict of arrays, or of what Orbax says of them, with `arrays_of`."""
    found = traverse_util.flatten_dict(arrays)
    for keys in sorted(expected):
        name, array = "/".join(keys), found.pop(keys, None)
        if array is None:  # of a quantized layer, or all of a dense one
            raise _damaged(directory, "/".join(keys[:-1]), f"missing: {keys[-1]}")
        stored = signature(array) if hasattr(array, "shape") else type(array).__name__
        if stored != expected[keys]:
            raise _damaged(directory, name, f"it is stored as {stored}, not as {expected[keys]}")
        chunk = getattr(getattr(array, "storage_metadata", None), "chunk_shape", None) or ()
        if any(part > size for part, size in zip(chunk, array.shape, strict=False)):
            # Each would be allocated whole.
            raise _damaged(directory, name, f"it is stored in chunks of {chunk}")
    if found:
        unknown = brief("/".join(map(str, next(iter(found)))))
        raise _damaged(directory, unknown, "it is not in the record")


def _description(path: Path) -> Tree:
    found = ocp.metadata(path).metadata
    if not isinstance(found, dict):  # it swallows some errors
        raise ValueError("it cannot describe the arrays")
    return found


def _contents(path: Path) -> Tree:
    found = ocp.load(path)
    if not isinstance(found, dict):
        raise ValueError(f"it finds a {type(found).__name__}")
    return found


def _orbax(directory: Path, read: Callable[[Path], Any], path: Path) -> Any:
    """read(path), of which a failure is one line and nothing else.

    On damaged files Orbax logs what it cannot parse, and reads that are still under way when it
    gives up print tracebacks of their own.
    """
    with _no_logs():
        _ignore_late_reads()
        try:
            return read(path)
        except Exception as error:  # it raises what it happens to, also KeyError
            reason = first_line(error)[:500]
        time.sleep(_LATE_SECONDS)
        gc.collect()  # a task whose error nobody took logs it then
    raise _damaged(directory, "arrays", f"Orbax: {reason}")


@functools.cache
def _ignore_late_reads() -> None:
    """From now on: a read that ends after Orbax gave up has nobody to tell, which is no error."""
    hook = sys.unraisablehook

    def filtered(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = filtered


@contextlib.contextmanager
def _no_logs() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(disabled)


def _finite(array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise ValueError("it contains NaN or Inf")
    return array


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a file that is whole or absent.

    Raises:
      ValueError: `value` is not made of finite JSON types.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold finite JSON types: {error}") from error
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


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


def _file_sums(directory: Path) -> dict[str, str]:
    """{path below `directory`: SHA-256} of Orbax's files."""
    sums = {}
    for path in sorted(path for path in (directory / "arrays").rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            sums[str(path.relative_to(directory))] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _damaged(directory: Path, name: str, why: str) -> ValueError:
    return ValueError(
        f"{directory} is damaged at {name}: {why}; restore it from a copy, or quantize again in "
        "another --workdir"
    )
