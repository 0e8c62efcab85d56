"""A VQTensor as named arrays and a JSON-able description, and back, bit for bit."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptvq_jax.grid import GroupGrid
from gptvq_jax.packing import packed_length
from gptvq_jax.vq_tensor import BlockScales, DenseCodebook, FactoredCodebook, VQTensor

FORMAT_VERSION = 1
_CODEBOOKS = {"dense": DenseCodebook, "factored": FactoredCodebook}
_KINDS = {codebook: kind for kind, codebook in _CODEBOOKS.items()}

State = dict[str, np.ndarray]
Meta = dict[str, Any]


def tensor_to_state(tensor: VQTensor) -> tuple[State, Meta]:
    """Splits a tensor into its stored arrays and its static fields.

    Returns:
      {"codes", "codebook.<field>", "block_scales.<field>"}, host arrays without those that are
      None, and a dict of JSON types: format_version, kind of codebook, index_bits, grid, and the
      static fields of the codebook and of the block scales (None if there are none).

    Raises:
      ValueError: no format is defined for this type of codebook.
    """
    if type(tensor.codebook) not in _KINDS:
        raise ValueError(f"no stored format is defined for {type(tensor.codebook).__name__}")
    codebook, codebook_meta = _split(tensor.codebook, "codebook.")
    scales, scales_meta = {}, None
    if tensor.block_scales is not None:
        scales, scales_meta = _split(tensor.block_scales, "block_scales.")
    meta = {
        "format_version": FORMAT_VERSION,
        "kind": _KINDS[type(tensor.codebook)],
        "index_bits": tensor.index_bits,
        "grid": dataclasses.asdict(tensor.grid),
        "codebook": codebook_meta,
        "block_scales": scales_meta,
    }
    return {"codes": np.asarray(tensor.codes), **codebook, **scales}, meta


def state_to_tensor(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> VQTensor:
    """Inverse of `tensor_to_state`; the tensor holds `arrays` themselves.

    Raises:
      ValueError: the format version or kind is unknown, a field or array is missing, or the codes
        do not fit the grid.
    """
    check_format_version(meta.get("format_version"), "the quantized tensor")
    if meta.get("kind") not in _CODEBOOKS:
        raise ValueError(
            f"kind={meta.get('kind')!r} of a quantized tensor must be one of {sorted(_CODEBOOKS)}"
        )
    try:
        grid = GroupGrid(**meta["grid"])
        scales_meta = meta["block_scales"]
        tensor = VQTensor(
            codes=arrays["codes"],
            codebook=_join(_CODEBOOKS[meta["kind"]], arrays, meta["codebook"], "codebook."),
            block_scales=scales_meta and _join(BlockScales, arrays, scales_meta, "block_scales."),
            index_bits=meta["index_bits"],
            grid=grid,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"a quantized tensor is stored incompletely: {error}") from error
    stored = (grid.rows, packed_length(grid.num_vectors, tensor.index_bits))
    if tensor.codes.shape[1:] != stored:
        raise ValueError(
            f"codes of shape {tensor.codes.shape} must be (M, {stored[0]}, {stored[1]}) for {grid} "
            f"and {tensor.index_bits} index bits"
        )
    return tensor


def check_format_version(version: Any, what: str) -> None:
    """Raises ValueError if `what` (named in the message) is of a version we cannot read."""
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{what} has format_version={version!r}, but this gptvq_jax reads {FORMAT_VERSION}; "
            "use the version that wrote it, or quantize again"
        )


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, independent of the order of the dict."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
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
        if field.metadata.get("static"):
            continue
        optional = "None" in str(field.type)
        name = prefix + field.name
        values[field.name] = arrays.get(name) if optional else arrays[name]
    return cls(**values)
