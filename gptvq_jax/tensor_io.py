"""A VQTensor as named arrays and a JSON-able description, and back, bit for bit."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gptvq_jax.grid import GroupGrid
from gptvq_jax.vq_tensor import BlockScales, DenseCodebook, FactoredCodebook, VQTensor

FORMAT_VERSION = 2  # of what is written
_READABLE = (1, FORMAT_VERSION)  # in 1 there were no row_scales
_CODEBOOKS = {"dense": DenseCodebook, "factored": FactoredCodebook}
_KINDS = {codebook: kind for kind, codebook in _CODEBOOKS.items()}

State = dict[str, np.ndarray]
Meta = dict[str, Any]


def tensor_to_state(tensor: VQTensor) -> tuple[State, Meta]:
    """Splits a tensor into its stored arrays and its static fields.

    Returns:
      {"codes", "codebook.<field>", "block_scales.<field>", "row_scales"}, host arrays without those
      that are None, and a dict of JSON types: format_version, kind of codebook, index_bits, grid,
      the static fields of the codebook and of the block scales (None if there are none), and the
      dtype and shape of every array as in {"codes": "uint8[1,576,216]"}.

    Raises:
      ValueError: no format is defined for this type of codebook.
    """
    if type(tensor.codebook) not in _KINDS:
        raise ValueError(f"no stored format is defined for {type(tensor.codebook).__name__}")
    codebook, codebook_meta = _split(tensor.codebook, "codebook.")
    scales, scales_meta = {}, None
    if tensor.block_scales is not None:
        scales, scales_meta = _split(tensor.block_scales, "block_scales.")
    arrays = {"codes": np.asarray(tensor.codes), **codebook, **scales}
    if tensor.row_scales is not None:
        arrays["row_scales"] = np.asarray(tensor.row_scales)
    meta = {
        "format_version": FORMAT_VERSION,
        "kind": _KINDS[type(tensor.codebook)],
        "index_bits": tensor.index_bits,
        "grid": dataclasses.asdict(tensor.grid),
        "codebook": codebook_meta,
        "block_scales": scales_meta,
        "arrays": {name: _signature(array) for name, array in arrays.items()},
    }
    return arrays, meta


def state_to_tensor(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> VQTensor:
    """Inverse of `tensor_to_state`; the tensor holds `arrays` themselves.

    Raises:
      ValueError: the format version or kind is unknown, a field is missing, or the arrays are not
        those that `meta` lists.
    """
    check_format_version(meta.get("format_version"), "the quantized tensor")
    if meta.get("kind") not in _CODEBOOKS:
        raise ValueError(
            f"kind={meta.get('kind')!r} of a quantized tensor must be one of {sorted(_CODEBOOKS)}"
        )
    signatures = {name: _signature(array) for name, array in arrays.items()}
    if signatures != meta.get("arrays"):
        raise ValueError(f"a quantized tensor has arrays {signatures}, not {meta.get('arrays')}")
    try:
        scales = meta["block_scales"]
        return VQTensor(
            codes=arrays["codes"],
            codebook=_join(_CODEBOOKS[meta["kind"]], arrays, meta["codebook"], "codebook."),
            block_scales=scales and _join(BlockScales, arrays, scales, "block_scales."),
            index_bits=meta["index_bits"],
            grid=GroupGrid(**meta["grid"]),
            row_scales=arrays.get("row_scales"),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"a quantized tensor is described incompletely: {error}") from error


def abstract_tensor(meta: Mapping[str, Any]) -> VQTensor:
    """The tensor that `meta` describes, with a jax.ShapeDtypeStruct in place of each array.

    Raises:
      ValueError: see `state_to_tensor`.
    """
    arrays = {}
    for name, signature in meta["arrays"].items():
        dtype, _, shape = signature.removesuffix("]").partition("[")
        arrays[name] = jax.ShapeDtypeStruct([int(n) for n in shape.split(",") if n], dtype)
    return state_to_tensor(arrays, meta)


def check_format_version(version: Any, what: str) -> None:
    """Raises ValueError if `what` (named in the message) is of a version we cannot read."""
    if version not in _READABLE:
        known = " and ".join(map(str, _READABLE))
        raise ValueError(
            f"{what} has format_version={version!r}, but this gptvq_jax reads {known}; "
            "use the version that wrote it, or quantize again"
        )


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, independent of the order of the dict."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name} {_signature(array)}\n".encode())
        sha.update(array.reshape(-1).view(np.uint8))
    return sha.hexdigest()


def _split(part: Any, prefix: str) -> tuple[State, Meta]:
    """Arrays (those that are not None) and static fields of one registered dataclass."""
    arrays, static = {}, {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.metadata.get("static"):
            static[field.name] = value
        elif value is not None:
            arrays[prefix + field.name] = np.asarray(value)
    return arrays, static


def _join(cls: type, arrays: Mapping[str, np.ndarray], static: Meta, prefix: str) -> Any:
    values = dict(static)
    for field in dataclasses.fields(cls):
        if not field.metadata.get("static"):
            values[field.name] = arrays.get(prefix + field.name)
    return cls(**values)


def _signature(array: np.ndarray) -> str:
    return f"{array.dtype.name}[{','.join(map(str, array.shape))}]"
