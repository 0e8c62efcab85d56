"""Whether the arrays of a quantized weight fit its static fields, and each other.

Kernels in C++ and lookups that promise to be in bounds believe what a quantized tensor says of
itself. It may come from a file that anyone wrote, so it is checked where a file is read (shapes and
values) and where a kernel takes it (shapes alone, which tracers have too).

Codes need no look: a codebook has as many centroids as `index_bits` bits count, and a reader masks
with as many bits, so every bit pattern is a code within the codebook. Bits beyond the last code of
a row are never looked up.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from gptvq_jax.console.errors import brief
from gptvq_jax.core import check_trellis
from gptvq_jax.core.array_checks import (
    MAX_SIZE,
    axis,
    brackets,
    check_equal,
    check_size,
    signature,
)
from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.packing import MAX_BITS, packed_length
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.core.vq_tensor import BlockScales, DenseCodebook, FactoredCodebook, VQTensor

_DENSE_DTYPES = {16: "float16", 8: "int8", 4: "uint8"}
_MAX_LOG2_SCALE = 127  # of a float32


def check_tensor(tensor: QuantizedTensor) -> None:
    """Compares shapes, dtypes and static fields; the arrays may be tracers or ShapeDtypeStructs.

    Raises:
      ValueError: they contradict each other or the definition; the message names the field.
    """
    trellis = isinstance(tensor, TrellisTensor)
    (check_trellis.check_static if trellis else _check_static)(tensor)
    arrays = dict(named_arrays(tensor))
    expected = (check_trellis.expected_arrays if trellis else _expected_arrays)(tensor)
    for name, (dtypes, shape) in expected.items():
        array = arrays.pop(name, None)
        if array is None:
            raise ValueError(f"{name} is missing")
        if array.dtype not in map(np.dtype, dtypes) or tuple(array.shape) != shape:
            wanted = " or ".join(f"{dtype}{brackets(shape)}" for dtype in dtypes)
            raise ValueError(f"{name} must be {wanted}, not {signature(array)}")
    if arrays:
        raise ValueError(f"{min(arrays)} has no place in this kind of tensor")


def check_values(tensor: QuantizedTensor) -> None:
    """Looks into host arrays that `check_tensor` accepts: every number must be finite.

    Raises:
      ValueError: a centroid, a factor or a scale is not, a block scale is beyond float32, or the
        streams of a trellis are not those that its rates say.
    """
    for name, array in named_arrays(tensor):
        if array.dtype == np.float16 and not np.isfinite(array).all():
            raise ValueError(f"{name} contains NaN or Inf")
    if isinstance(tensor, TrellisTensor):
        check_trellis.check_values(tensor)
        return
    scales = tensor.block_scales
    if scales is not None:
        largest = np.float32(scales.offset) + 15 * np.maximum(np.float32(scales.step), 0)
        if largest.max() > _MAX_LOG2_SCALE:
            raise ValueError(f"block_scales reach 2^{largest.max():.0f}, beyond float32")


def named_arrays(tensor: QuantizedTensor) -> Iterator[tuple[str, Any]]:
    """(name, array) of every array, in order.

    A name is that of the field, in a codebook or in block scales after theirs and a dot."""
    if isinstance(tensor, TrellisTensor):
        yield from check_trellis.named_arrays(tensor)
        return
    yield "codes", tensor.codes
    for prefix, part in (("codebook", tensor.codebook), ("block_scales", tensor.block_scales)):
        for field in dataclasses.fields(part) if part is not None else ():
            value = getattr(part, field.name)
            if not field.metadata.get("static") and value is not None:
                yield f"{prefix}.{field.name}", value
    if tensor.row_scales is not None:
        yield "row_scales", tensor.row_scales


def _check_static(tensor: VQTensor) -> None:
    grid, book, scales = tensor.grid, tensor.codebook, tensor.block_scales
    if not isinstance(grid, GroupGrid):
        raise ValueError(f"grid must be a GroupGrid, not {type(grid).__name__}")
    for field in dataclasses.fields(grid):
        check_size(f"grid.{field.name}", getattr(grid, field.name), MAX_SIZE)
    # Bytes are made for whole strips: one that is much larger than the matrix is never written.
    if grid.strip_rows > grid.rows:
        raise ValueError(f"grid.strip_rows={grid.strip_rows} must be at most rows={grid.rows}")
    if grid.strip_cols >= grid.cols + grid.dim:
        raise ValueError(
            f"grid.strip_cols={grid.strip_cols} must be at most cols={grid.cols}, rounded up to "
            f"vectors of {grid.dim}"
        )
    check_size("index_bits", tensor.index_bits, MAX_BITS)
    if isinstance(book, DenseCodebook):
        check_equal("codebook.dim", book.dim, grid.dim)
        check_equal("codebook.codebook_size", book.codebook_size, 2**tensor.index_bits)
        if type(book.bits) is not int or book.bits not in _DENSE_DTYPES:
            raise ValueError(f"codebook.bits={brief(book.bits)} must be 16, 8 or 4")
    elif isinstance(book, FactoredCodebook):
        check_equal("grid.dim of a factored codebook", grid.dim, 1)
    else:
        raise ValueError(f"codebook must be dense or factored, not {type(book).__name__}")
    if scales is not None:
        if not isinstance(scales, BlockScales):
            raise ValueError(f"block_scales must be BlockScales, not {type(scales).__name__}")
        check_size("block_scales.block_size", scales.block_size, MAX_SIZE)
        if scales.block_size % grid.dim:
            raise ValueError(
                f"block_scales.block_size={scales.block_size} must be a multiple of {grid.dim=}"
            )
        blocks = -(-grid.strip_cols // scales.block_size)
        check_equal("block_scales.blocks", scales.blocks, blocks)


def _expected_arrays(tensor: VQTensor) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """{name: (dtypes it may have, shape)} of a tensor whose static fields are right.

    What they leave open, the number of codebooks and the rank, is read off one array each.
    """
    grid, book, scales = tensor.grid, tensor.codebook, tensor.block_scales
    size, vectors = 2**tensor.index_bits, grid.num_vectors
    books = axis("codes", tensor.codes, 3, 0)
    groups = (books, grid.col_strips, grid.row_strips)
    centroids = books * grid.col_strips * grid.row_strips * size
    if centroids > MAX_SIZE:
        raise ValueError(f"{centroids} centroids are more than {MAX_SIZE}, which can be counted")
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
        rank = axis("codebook.right", book.right, 2, 0)
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
