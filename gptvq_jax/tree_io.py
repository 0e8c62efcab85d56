"""One Orbax directory: a nested dict of arrays and VQTensors, with a description to check it by."""

import functools
import operator
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

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

Tree = dict[str, Any]
Record = dict[str, Any]


def save_tree(directory: Path, tree: Mapping[str, Any], dense_dtype: str) -> Record:
    """Writes a tree under a temporary name and renames it, so `directory` is whole or absent.

    Whatever an interrupted run left under either name is replaced.

    Args:
      directory: to be created.
      tree: nested dict with strings as keys; a leaf is a VQTensor or an array.
      dense_dtype: key of DENSE_DTYPES, in which arrays are stored.

    Returns:
      The description stored with it: {"format_version", "quantized": {name: meta}, "dense":
      {name: meta}}, where a name joins the keys by "/" and a meta holds at least shape, num_bytes
      and sha256.

    Raises:
      ValueError: a value is too large for `dense_dtype`.
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
    record = {"format_version": FORMAT_VERSION, "quantized": quantized, "dense": dense}

    directory.parent.mkdir(parents=True, exist_ok=True)
    leftovers = directory.parent.glob(f"{directory.name}.orbax-checkpoint-tmp*")
    for leftover in (directory, *leftovers):
        shutil.rmtree(leftover, ignore_errors=True)
    ocp.save(directory, traverse_util.unflatten_dict(stored, sep="/"), custom_metadata=record)
    return record


def read_record(directory: Path) -> Record | None:
    """The description of a tree, without its arrays; None if `directory` is absent or unfinished.

    Raises:
      ValueError: another format version wrote it.
    """
    if not ocp.is_orbax_checkpoint(directory):
        return None
    try:
        record = ocp.metadata(directory).custom_metadata
    except Exception:  # Orbax names no common base class of its errors
        return None
    if not record:
        return None
    check_format_version(record.get("format_version"), str(directory))
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
    try:
        arrays = ocp.load(directory)
    except Exception as error:  # Orbax names no common base class of its errors
        raise _damaged(directory, "its arrays", str(error).split("\n")[0][:200]) from error

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


def _damaged(directory: Path, name: str, why: str) -> ValueError:
    return ValueError(
        f"{directory} is damaged at {name}: {why}; delete it and rerun scripts/quantize.py with "
        "the same --workdir"
    )
