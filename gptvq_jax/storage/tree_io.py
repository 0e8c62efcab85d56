"""One stored tree: a dict of arrays and quantized tensors, with a description to check it by.

arrays/        Orbax
record.json    written last: its presence means complete
"""

import functools
import json
import operator
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from gptvq_jax.console.json_file import read_own_object
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.files import durable, sharing
from gptvq_jax.files.disk_space import check_room, naming_full_disk
from gptvq_jax.storage import orbax_files
from gptvq_jax.storage.tensor_io import (
    FORMAT_VERSION,
    check_format_version,
    digest,
    state_to_tensor,
    tensor_to_state,
)
from gptvq_jax.storage.tree_arrays import (
    DamagedError,
    Tree,
    check_files,
    damaged,
    file_sums,
    read_arrays,
)
from gptvq_jax.storage.tree_record import (
    ARRAYS,
    DENSE_DTYPES,
    RECORD,
    Record,
    check_record,
    dense_meta,
    quantized_meta,
)


def save_tree(directory: Path, tree: Mapping[str, Any], dense_dtype: str) -> Record:
    """Writes a tree; until that is done, `directory` does not count as one.

    Whatever an interrupted run left there is replaced.

    Args:
      directory: to be created.
      tree: nested dict with strings as keys; a leaf is a QuantizedTensor or an array.
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
        if isinstance(leaf, QuantizedTensor):
            stored[name], _ = tensor_to_state(leaf)
            quantized[name] = quantized_meta(leaf, digest(stored[name]))
        else:
            array = stored[name] = cast_dense(leaf, dense_dtype, name)
            dense[name] = dense_meta(array.shape, dense_dtype, digest({"": array}))

    size = sum(array.nbytes for array in jax.tree.leaves(stored))
    check_room(directory, size)
    sharing.by_writer(lambda: _drop(directory))
    try:
        with naming_full_disk(directory, size):
            sharing.by_writer(lambda: durable.make_directory(directory))
            orbax_files.save(directory / ARRAYS, traverse_util.unflatten_dict(stored, sep="/"))
            sharing.by_writer(lambda: durable.sync_tree(directory))
            record = {
                "format_version": FORMAT_VERSION,
                "quantized": quantized,
                "dense": dense,
                "files": file_sums(directory),
            }
            write_json(directory / RECORD, record)
    except BaseException:
        # Ctrl-C behind the last rename must not undo a block.
        if sharing.writes() and not is_stored(directory):
            shutil.rmtree(directory, ignore_errors=True)
        raise
    return record


def _drop(directory: Path) -> None:
    """What an earlier run has left there; its record first: a kill must not leave it alone."""
    if directory.exists():
        (directory / RECORD).unlink(missing_ok=True)
        durable.sync(directory)
        shutil.rmtree(directory)


def read_record(directory: Path) -> Record | None:
    """The description of a tree, without its arrays; None if `directory` is absent or unfinished.

    Raises:
      ValueError: it is damaged or of another format version.
    """
    path = directory / RECORD
    if not path.exists():
        return None
    try:
        record = read_own_object(path)
    except ValueError as error:
        raise damaged(directory, RECORD, str(error)) from None
    check_format_version(record.get("format_version"), str(path))
    try:
        check_record(record)
    except ValueError as error:
        raise damaged(directory, RECORD, str(error)) from None
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
            f"{directory} is missing or unfinished; rerun gptvq_jax quantize with the same "
            "--workdir to complete it"
        )
    return record


def load_tree(directory: Path) -> tuple[Tree, Record]:
    """Reads a tree of host arrays and quantized tensors of host arrays, and its description.

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
    check_files(directory, record)
    arrays = read_arrays(directory, record)
    tree = {}
    for name, meta in (record["quantized"] | record["dense"]).items():
        leaf = functools.reduce(operator.getitem, name.split("/"), arrays)
        packed = name in record["quantized"]
        if digest(leaf if packed else {"": leaf}) != meta["sha256"]:
            raise damaged(directory, name, "its SHA-256 is not the one recorded")
        try:
            tree[name] = state_to_tensor(leaf, meta) if packed else _finite(leaf)
        except ValueError as error:
            raise damaged(directory, name, str(error)) from None
    return traverse_util.unflatten_dict(tree, sep="/")


def _finite(array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise ValueError("it contains NaN or Inf")
    return array


def is_stored(directory: Path) -> bool:
    """Whether a tree was written to its end; says nothing of what became of it since."""
    return (directory / RECORD).exists()


def damage(directory: Path) -> str | None:
    """What is wrong with the files of a tree whose record is there; None if nothing is.

    Raises:
      ValueError: it is of another format version.
    """
    try:
        record = read_record(directory)
        if record is not None:
            check_files(directory, record)
    except DamagedError as error:
        return str(error)
    return None


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
