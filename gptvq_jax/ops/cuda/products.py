"""x W^T from packed codes on NVIDIA GPUs: CUDA C++ for few rows of x, called through jax.ffi.

Weights are int8 centroids, looked up by byte permutations in registers; x is rounded to two digits
of int8 (three for float32) for every column strip, so that it keeps what its dtype holds; dp4a
multiplies them. More rows of x: XLA decodes the weight once. What it must cost is written in
docs/kernels.md.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.core.vq_tensor import DenseCodebook, VQTensor
from gptvq_jax.ops import xla
from gptvq_jax.ops.cuda import build
from gptvq_jax.ops.cuda.layout import (
    BITS,
    PackedWeight,
    pack,
    round_x,
    strip_tiles,
    strip_units,
    unpack,
)

__all__ = ["check", "matmul", "pack"]
_DIMS = (1, 2, 4)
_MAX_BATCH = 8  # rows of x that the kernel takes
_MAX_UNITS = 2**15  # of a row: what the kernel's division by multiplication is exact for


def check(tensor: VQTensor) -> None:
    """Raises NotImplementedError for what the kernel cannot read, or if it cannot be built."""
    why = why_not(tensor)
    if why:
        raise NotImplementedError(why)
    build.load()


def why_not(tensor: VQTensor) -> str | None:
    """Why the kernel cannot read a tensor; None if it can."""
    book, grid = tensor.codebook, tensor.grid
    if not isinstance(book, DenseCodebook) or book.bits == 16:
        return "its centroids must be int8 or int4"
    if tensor.index_bits != BITS or tensor.codes.shape[0] != 1:
        return f"it takes one codebook with codes of {BITS} bits"
    if grid.dim not in _DIMS:
        return f"it takes vectors of {', '.join(map(str, _DIMS))} weights, not {grid.dim}"
    if tensor.block_scales is not None:
        return "it has no block scales"
    if grid.col_strips * strip_units(grid) >= _MAX_UNITS:
        return f"{grid.cols} columns are too many for it"
    return None


def matmul(x: jax.Array, packed: PackedWeight) -> jax.Array:
    """x (N, C), packed weight of shape (R, C) -> (N, R) float32.

    x in bfloat16 or float16 is rounded to 1/64516 of the largest magnitude among the columns that
    share codebooks, x in float32 to 1/16387064 of it.
    """
    if not 1 <= x.shape[0] <= _MAX_BATCH:
        return xla.matmul(x, unpack(packed))
    grid, rows = packed.grid, packed.tile_rows
    digits, scales = round_x(x, grid, 3 if x.dtype.itemsize > 2 else 2)
    shape = x.shape[0], packed.codes.shape[0] * rows
    y = jax.ffi.ffi_call(build.TARGET, jax.ShapeDtypeStruct(shape, jnp.float32))(
        digits,
        scales,
        packed.codes,
        packed.tables,
        packed.scales,
        strip_tiles=np.int64(strip_tiles(grid)),
        rows=np.int64(rows),
    )
    y = y.reshape(x.shape[0], grid.row_strips, -1)[:, :, : grid.strip_rows]
    return y.reshape(x.shape[0], -1)[:, : grid.rows]
