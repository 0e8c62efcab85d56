"""A quantized tensor as named arrays and a JSON-able description, and back, bit for bit."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gptvq_jax.console.errors import brief
from gptvq_jax.core.check_tensor import check_tensor, check_values, named_arrays, signature
from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.core.vq_tensor import BlockScales, DenseCodebook, FactoredCodebook, VQTensor

FORMAT_VERSION = 3  # of what is written
_READABLE = (1, 2, FORMAT_VERSION)  # in 1 there were no row_scales, in 2 no trellis codes
_CODEBOOKS = {"dense": DenseCodebook, "factored": FactoredCodebook}
_KINDS = {codebook: kind for kind, codebook in _CODEBOOKS.items()}
_TRELLIS = "trellis"

# No array of a tensor is a scalar. Sizes have few digits, so that text cannot name absurd ones.
_SIGNATURE = re.compile(
    r"(?P<dtype>u?int8|uint16|float16)\[(?P<shape>[0-9]{1,12}(,[0-9]{1,12}){0,5})\]"
)

_MAX_INT = 2**63 - 1

State = dict[str, np.ndarray]
Meta = dict[str, Any]


def tensor_to_state(tensor: QuantizedTensor) -> tuple[State, Meta]:
    """Splits a tensor into its stored arrays and its static fields.

    Returns:
      {"codes", "codebook.<field>", "block_scales.<field>", "row_scales"}, host arrays without those
      that are None, and the tensor's `describe`.

    Raises:
      ValueError: no format is defined for this type of codebook.
    """
    arrays = {name: np.asarray(array) for name, array in named_arrays(tensor)}
    return arrays, describe(tensor)


def describe(tensor: QuantizedTensor) -> Meta:
    """What is stored beside a tensor's arrays, whose contents it does not look at.

    Returns:
      A dict of JSON types: format_version, kind ("trellis", or that of the codebook), the static
      fields of the tensor, of a VQTensor's grid, codebook and block scales (None if there are none)
      in dicts of their own, and the dtype and shape of every array as in {"codes":
      "uint8[1,576,216]"}.

    Raises:
      ValueError: no format is defined for this type of codebook.
    """
    arrays = {name: signature(array) for name, array in named_arrays(tensor)}
    if isinstance(tensor, TrellisTensor):
        static = _static_values(tensor)
        return {"format_version": FORMAT_VERSION, "kind": _TRELLIS, **static, "arrays": arrays}
    if type(tensor.codebook) not in _KINDS:
        raise ValueError(f"no stored format is defined for {type(tensor.codebook).__name__}")
    scales = tensor.block_scales
    return {
        "format_version": FORMAT_VERSION,
        "kind": _KINDS[type(tensor.codebook)],
        "index_bits": tensor.index_bits,
        "grid": _static_values(tensor.grid),
        "codebook": _static_values(tensor.codebook),
        "block_scales": None if scales is None else _static_values(scales),
        "arrays": arrays,
    }


def state_to_tensor(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> QuantizedTensor:
    """Inverse of `tensor_to_state`; the tensor holds `arrays` themselves.

    Raises:
      ValueError: the format version or kind is unknown, a field is missing, the arrays are not
        those that `meta` lists, or they do not make a tensor (`check_tensor`, `check_values`).
    """
    tensor = _join(arrays, meta)
    check_values(tensor)
    return tensor


def abstract_tensor(meta: Mapping[str, Any]) -> QuantizedTensor:
    """The tensor that `meta` describes, with a jax.ShapeDtypeStruct in place of each array.

    Raises:
      ValueError: see `state_to_tensor`.
    """
    listed = meta.get("arrays")
    if not isinstance(listed, dict):
        raise ValueError(f"arrays={brief(listed)} of a quantized tensor must be an object")
    return _join({name: _parse_signature(name, text) for name, text in listed.items()}, meta)


def check_format_version(version: Any, what: str) -> None:
    """Raises ValueError if `what` (named in the message) is of a version we cannot read."""
    if type(version) is not int or version not in _READABLE:
        known = " and ".join(", ".join(map(str, _READABLE)).rsplit(", ", 1))
        raise ValueError(
            f"{what} has format_version={brief(version)}, but this gptvq_jax reads {known}; "
            "use the version that wrote it, or quantize again"
        )


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, independent of the order of the dict."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name} {signature(array)}\n".encode())
        sha.update(array.reshape(-1).view(np.uint8))
    return sha.hexdigest()


def _join(arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> QuantizedTensor:
    """The tensor of arrays and of a description that anyone may have written."""
    check_format_version(meta.get("format_version"), "the quantized tensor")
    kind = meta.get("kind")
    known = sorted([*_CODEBOOKS, _TRELLIS])
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"kind={brief(kind)} of a quantized tensor must be one of {known}")
    signatures = {name: signature(array) for name, array in arrays.items()}
    if signatures != meta.get("arrays"):
        listed = repr(meta.get("arrays"))[:1000]
        raise ValueError(f"a quantized tensor has arrays {signatures}, not {listed}")
    if kind == _TRELLIS:
        return _checked(_join_trellis(arrays, meta), arrays)
    for name in ("codes", "index_bits", "grid", "codebook", "block_scales"):
        if name not in (arrays if name == "codes" else meta):
            raise ValueError(f"a quantized tensor is described incompletely: {name!r} is missing")
    scales = meta["block_scales"]
    tensor = VQTensor(
        codes=arrays["codes"],
        codebook=_part(_CODEBOOKS[kind], arrays, meta["codebook"], "codebook"),
        block_scales=None if scales is None else _part(BlockScales, arrays, scales, "block_scales"),
        index_bits=meta["index_bits"],
        grid=_part(GroupGrid, {}, meta["grid"], "grid"),
        row_scales=arrays.get("row_scales"),
    )
    return _checked(tensor, arrays)


def _join_trellis(arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> TrellisTensor:
    static = {}
    for name in _static_fields(TrellisTensor):
        if name not in meta:
            raise ValueError(f"a quantized tensor is described incompletely: {name!r} is missing")
        static[name] = meta[name]
    names = [field.name for field in dataclasses.fields(TrellisTensor) if field.name not in static]
    return TrellisTensor(**static, **{name: arrays.get(name) for name in names})


def _checked(tensor: QuantizedTensor, arrays: Mapping[str, Any]) -> QuantizedTensor:
    check_tensor(tensor)
    if unused := arrays.keys() - dict(named_arrays(tensor)):
        raise ValueError(f"a quantized tensor has no place for the array {min(unused)}")
    return tensor


def _part(cls: type, arrays: Mapping[str, Any], static: Any, name: str) -> Any:
    """One dataclass of a tensor, of arrays and of static fields, which are integers."""
    names = _static_fields(cls)
    if not isinstance(static, dict) or static.keys() != set(names):
        raise ValueError(
            f"{name}={brief(static)} must be an object of {', '.join(names) or 'nothing'}"
        )
    for field, value in static.items():
        if type(value) is not int or abs(value) > _MAX_INT:
            raise ValueError(f"{name}.{field}={brief(value)} must be an integer of 64 bits")
    fields = {field.name for field in dataclasses.fields(cls)} - set(names)
    return cls(**static, **{field: arrays.get(f"{name}.{field}") for field in fields})


def _static_fields(cls: type) -> list[str]:
    """Names of the fields of a dataclass that hold no array."""
    return [
        field.name
        for field in dataclasses.fields(cls)
        if cls is GroupGrid or field.metadata.get("static")
    ]


def _static_values(part: Any) -> Meta:
    return {name: getattr(part, name) for name in _static_fields(type(part))}


def _parse_signature(name: str, text: Any) -> jax.ShapeDtypeStruct:
    match = _SIGNATURE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"array {brief(name)} is described as {brief(text)}, not as uint8[1,2,3]")
    shape = [int(size) for size in match["shape"].split(",")]
    return jax.ShapeDtypeStruct(shape, match["dtype"])
