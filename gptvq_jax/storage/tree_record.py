"""What record.json says of a stored tree, and whether it can be true.

A description has one form: everything in it but sums follows from a few fields, and is compared
with what follows. So no field can be missing, unknown, of another type or at odds with another.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from gptvq_jax.console.errors import brief
from gptvq_jax.console.json_file import leaves_directory
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.storage.tensor_io import abstract_tensor, describe

RECORD, ARRAYS = "record.json", "arrays"  # of a tree, in its directory
DENSE_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
_SHA256 = re.compile("[0-9a-f]{64}")
_MAX_SIZE = 2**31 - 1  # of an axis

Meta = dict[str, Any]
Record = dict[str, Any]


def quantized_meta(tensor: QuantizedTensor, sha256: str) -> Meta:
    """Describes a quantized leaf, whose arrays may be abstract, with the sum of its arrays."""
    counts = {"shape": list(tensor.shape), "num_bytes": tensor.num_bytes}
    counts |= {"bits_per_value": tensor.bits_per_value, "sha256": sha256}
    return counts | describe(tensor)


def dense_meta(shape: Iterable[int], dtype: str, sha256: str) -> Meta:
    """Describes an array."""
    shape = list(shape)
    num_bytes = math.prod(shape) * DENSE_DTYPES[dtype].itemsize
    return {"shape": shape, "num_bytes": num_bytes, "dtype": dtype, "sha256": sha256}


def check_quantized_meta(meta: Any) -> QuantizedTensor:
    """Returns the described tensor, with a jax.ShapeDtypeStruct in place of each array.

    Raises:
      ValueError: `meta` is not a `quantized_meta`, or no such tensor exists.
    """
    sha256 = _check_sum(meta)
    tensor = abstract_tensor(meta)
    expected = quantized_meta(tensor, sha256) | {"format_version": meta["format_version"]}
    _check_same(meta, expected)
    return tensor


def check_dense_meta(meta: Any) -> None:
    """Raises ValueError if `meta` is not a `dense_meta`."""
    sha256 = _check_sum(meta)
    shape, dtype = meta.get("shape"), meta.get("dtype")
    if not isinstance(shape, list) or not all(
        type(size) is int and 1 <= size <= _MAX_SIZE for size in shape
    ):
        raise ValueError(f"shape={brief(shape)} must be a list of sizes")
    if not isinstance(dtype, str) or dtype not in DENSE_DTYPES:
        raise ValueError(f"dtype={brief(dtype)} must be one of {', '.join(DENSE_DTYPES)}")
    _check_same(meta, dense_meta(shape, dtype, sha256))


def check_record(record: Mapping[str, Any]) -> None:
    """Raises ValueError if `record` is not what save_tree writes; the caller names the file."""
    check_fields(record, ("format_version", "quantized", "dense", "files"))
    for section in ("quantized", "dense", "files"):
        if not isinstance(record[section], dict):
            raise ValueError(f"{section}={brief(record[section])} must be an object")
    _check_names([*record["quantized"], *record["dense"]])
    check_metas(record["quantized"], record["dense"])
    for name, sha256 in record["files"].items():
        _check_file(name, sha256)


def check_metas(quantized: Mapping[str, Any], dense: Mapping[str, Any]) -> None:
    """Raises ValueError, with the name, if one is no `quantized_meta` or no `dense_meta`."""
    for check, section in ((check_quantized_meta, quantized), (check_dense_meta, dense)):
        for name, meta in section.items():
            try:
                check(meta)
            except ValueError as error:
                raise ValueError(f"{brief(name)}: {error}") from None


def check_fields(found: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises ValueError if a dict has not just these fields."""
    names = set(names)
    if missing := sorted(names - found.keys()):
        raise ValueError(f"the field {missing[0]!r} is missing")
    if unknown := sorted(found.keys() - names):
        raise ValueError(f"the field {brief(unknown[0])} is unknown")


def arrays_of(record: Record) -> dict[tuple[str, ...], str]:
    """{path of an array in the nested dict that is stored: its signature, as uint8[1,2,3]}."""
    arrays = {}
    for name, meta in record["quantized"].items():
        for array, signature in meta["arrays"].items():
            arrays[*name.split("/"), array] = signature
    for name, meta in record["dense"].items():
        sizes = ",".join(map(str, meta["shape"]))
        arrays[*name.split("/"),] = f"{meta['dtype']}[{sizes}]"
    return arrays


def same(a: Any, b: Any) -> bool:
    """Whether two values are the same JSON: unlike ==, it tells 1, 1.0 and true apart."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _check_same(meta: Mapping[str, Any], expected: Meta) -> None:
    check_fields(meta, expected)
    for name, value in expected.items():
        if not same(meta[name], value):
            raise ValueError(f"{name} is {brief(meta[name])}, but the rest makes it {value}")


def _check_sum(meta: Any) -> str:
    if not isinstance(meta, dict):
        raise ValueError(f"{brief(meta)} must be an object")
    return _sha256(meta.get("sha256"))


def _sha256(text: Any) -> str:
    if not isinstance(text, str) or not _SHA256.fullmatch(text):
        raise ValueError(f"sha256={brief(text)} must be 64 hexadecimal digits")
    return text


def _check_names(names: list[str]) -> None:
    """A name is a path in a nested dict: of whole parts, and none may lie within another."""
    if len(set(names)) < len(names):
        raise ValueError("a name is both quantized and dense")
    paths = {tuple(name.split("/")) for name in names}
    for path in sorted(paths):
        if not all(path):
            raise ValueError(f"the name {brief('/'.join(path))} has an empty part")
        if any(path[:length] in paths for length in range(1, len(path))):
            raise ValueError(f"the name {brief('/'.join(path))} lies within another")


def _check_file(name: str, sha256: Any) -> None:
    if not name.startswith("arrays/") or leaves_directory(name):
        raise ValueError(f"files: {brief(name)} must be a path below arrays/")
    try:
        _sha256(sha256)
    except ValueError as error:
        raise ValueError(f"files: {brief(name)}: {error}") from None
