"""Whether the arrays of a quantized weight fit its static fields, and each other.

Kernels in C++ and lookups that promise to be in bounds believe what a VQTensor says of itself. It
may come from a file that anyone wrote, so it is checked where a file is read (shapes and values)
and where a kernel takes it (shapes alone, which tracers have too).

Codes need no look: a codebook has as many centroids as `index_bits` bits count, and a reader masks
with as many bits, so every bit pattern is a code within the codebook. Bits beyond the last code of
a row are never looked up.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from gptvq_jax.console.errors import brief
from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.packing import MAX_BITS, packed_length
from gptvq_jax.core.vq_tensor import BlockScales, DenseCodebook, FactoredCodebook, VQTensor

_MAX_SIZE = 2**31 - 1  # of an axis, and of the centroids of a tensor: they are counted in int32
_DENSE_DTYPES = {16: "float16", 8: "int8", 4: "uint8"}
_MAX_LOG2_SCALE = 127  # of a float32


def check_tensor(tensor: VQTensor) -> None:
    """Compares shapes, dtypes and static fields; the arrays may be tracers or ShapeDtypeStructs.

    Raises:
      ValueError: they contradict each other or the definition; the message names the field.
    """
    _check_static(tensor)
    arrays = dict(named_arrays(tensor))
    expected = _expected_arrays(tensor)
    for name, (dtypes, shape) in expected.items():
        array = arrays.pop(name, None)
        if array is None:
            raise ValueError(f"{name} is missing")
        if array.dtype not in map(np.dtype, dtypes) or tuple(array.shape) != shape:
            wanted = " or ".join(f"{dtype}{_brackets(shape)}" for dtype in dtypes)
            raise ValueError(f"{name} must be {wanted}, not {signature(array)}")
    if arrays:
        raise ValueError(f"{min(arrays)} has no place in this kind of tensor")


def check_values(tensor: VQTensor) -> None:
    """Looks into host arrays that `check_tensor` accepts: every number must be finite.

    Raises:
      ValueError: a centroid, a factor or a scale is not, or a block scale is beyond float32.
    """
    for name, array in named_arrays(tensor):
        if array.dtype == np.float16 and not np.isfinite(array).all():
            raise ValueError(f"{name} contains NaN or Inf")
    scales = tensor.block_scales
    if scales is not None:
        largest = np.float32(scales.offset) + 15 * np.maximum(np.float32(scales.step), 0)
        if largest.max() > _MAX_LOG2_SCALE:
            raise ValueError(f"block_scales reach 2^{largest.max():.0f}, beyond float32")


def named_arrays(tensor: VQTensor) -> Iterator[tuple[str, Any]]:
    """("codes" | "codebook.<field>" | "block_scales.<field>" | "row_scales", array), in order."""
    yield "codes", tensor.codes
    for prefix, part in (("codebook", tensor.codebook), ("block_scales", tensor.block_scales)):
        for field in dataclasses.fields(part) if part is not None else ():
            value = getattr(part, field.name)
            if not field.metadata.get("static") and value is not None:
                yield f"{prefix}.{field.name}", value
    if tensor.row_scales is not None:
        yield "row_scales", tensor.row_scales


def signature(array: Any) -> str:
    """dtype and shape, as in uint8[1,576,216]."""
    return f"{np.dtype(array.dtype).name}{_brackets(array.shape)}"


def _check_static(tensor: VQTensor) -> None:
    grid, book, scales = tensor.grid, tensor.codebook, tensor.block_scales
    if not isinstance(grid, GroupGrid):
        raise ValueError(f"grid must be a GroupGrid, not {type(grid).__name__}")
    for field in dataclasses.fields(grid):
        _check_size(f"grid.{field.name}", getattr(grid, field.name), _MAX_SIZE)
    # Bytes are made for whole strips: one that is much larger than the matrix is never written.
    if grid.strip_rows > grid.rows:
        raise ValueError(f"grid.strip_rows={grid.strip_rows} must be at most rows={grid.rows}")
    if grid.strip_cols >= grid.cols + grid.dim:
        raise ValueError(
            f"grid.strip_cols={grid.strip_cols} must be at most cols={grid.cols}, rounded up to "
            f"vectors of {grid.dim}"
        )
    _check_size("index_bits", tensor.index_bits, MAX_BITS)
    if isinstance(book, DenseCodebook):
        _check_equal("codebook.dim", book.dim, grid.dim)
        _check_equal("codebook.codebook_size", book.codebook_size, 2**tensor.index_bits)
        if type(book.bits) is not int or book.bits not in _DENSE_DTYPES:
            raise ValueError(f"codebook.bits={brief(book.bits)} must be 16, 8 or 4")
    elif isinstance(book, FactoredCodebook):
        _check_equal("grid.dim of a factored codebook", grid.dim, 1)
    else:
        raise ValueError(f"codebook must be dense or factored, not {type(book).__name__}")
    if scales is not None:
        if not isinstance(scales, BlockScales):
            raise ValueError(f"block_scales must be BlockScales, not {type(scales).__name__}")
        _check_size("block_scales.block_size", scales.block_size, _MAX_SIZE)
        if scales.block_size % grid.dim:
            raise ValueError(
                f"block_scales.block_size={scales.block_size} must be a multiple of {grid.dim=}"
            )
        blocks = -(-grid.strip_cols // scales.block_size)
        _check_equal("block_scales.blocks", scales.blocks, blocks)


def _expected_arrays(tensor: VQTensor) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """{name: (dtypes it may have, shape)} of a tensor whose static fields are right.

    What they leave open, the number of codebooks and the rank, is read off one array each.
    """
    grid, book, scales = tensor.grid, tensor.codebook, tensor.block_scales
    size, vectors = 2**tensor.index_bits, grid.num_vectors
    books = _axis("codes", tensor.codes, 3, 0)
    groups = (books, grid.col_strips, grid.row_strips)
    centroids = books * grid.col_strips * grid.row_strips * size
    if centroids > _MAX_SIZE:
        raise ValueError(f"{centroids} centroids are more than {_MAX_SIZE}, which can be counted")
    code_bytes = packed_length(vectors, tensor.index_bits)
    expected = {"codes": (("uint8",), (books, grid.rows, code_bytes))}
    if isinstance(book, DenseCodebook):
        shape = (*groups, size, grid.dim)
        if book.bits == 4:
            shape = (*groups, packed_length(size * grid.dim, 4))
        expected["codebook.centroids"] = ((_DENSE_DTYPES[book.bits],), shape)
        if book.bits != 16:
            expected["codebook.scale"] = (("float16",), groups)
    else:
        rank = _axis("codebook.right", book.right, 2, 0)
        expected["codebook.right"] = (("float16",), (rank, size))
        dtype = "float16" if book.left_scale is None else "int8"
        expected["codebook.left"] = ((dtype,), (*groups, rank))
        if book.left_scale is not None:
            expected["codebook.left_scale"] = (("float16",), (rank,))
    if scales is not None:
        shape = (grid.rows, grid.col_strips, packed_length(scales.blocks, 4))
        expected["block_scales.codes"] = (("uint8",), shape)
        expected["block_scales.offset"] = (("float16",), (grid.col_strips,))
        expected["block_scales.step"] = (("float16",), (grid.col_strips,))
    if tensor.row_scales is not None:
        expected["row_scales"] = (("float16",), (grid.rows,))
    return expected


def _axis(name: str, array: Any, ndim: int, axis: int) -> int:
    shape = getattr(array, "shape", None)
    if shape is None:
        raise ValueError(f"{name} is missing")
    if len(shape) != ndim or not 1 <= shape[axis] <= _MAX_SIZE:
        raise ValueError(f"{name} must have {ndim} axes and none that is empty, not {list(shape)}")
    return shape[axis]


def _check_size(name: str, value: Any, largest: int) -> None:
    if type(value) is not int or not 1 <= value <= largest:
        raise ValueError(f"{name}={brief(value)} must be an integer of 1 to {largest}")


def _check_equal(name: str, value: Any, expected: int) -> None:
    if type(value) is not int or value != expected:
        raise ValueError(f"{name}={brief(value)} must be {expected}")


def _brackets(shape: Any) -> str:
    return f"[{','.join(map(str, shape))}]"
