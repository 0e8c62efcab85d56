"""The C++ kernels as JAX functions of a VQTensor."""

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.core import packing
from gptvq_jax.core.check_tensor import check_tensor
from gptvq_jax.core.vq_tensor import DenseCodebook, VQTensor, block_scale_values
from gptvq_jax.ops.cpu.build import library
from gptvq_jax.ops.cpu.call import Call

INT4_GROUP_SIZE = 128  # inputs that share a scale, in int4.py
_DIMS = (1, 2, 4, 8, 16)


def why_not_in_registers(tensor: VQTensor) -> str | None:
    """Why the fast kernels, whose tables of int8 centroids stay in registers, cannot read it."""
    book = tensor.codebook
    if not isinstance(book, DenseCodebook) or book.bits == 16:
        return "its centroids must be int8 or int4"
    if tensor.block_scales is not None:
        return "it has no block scales"
    if tensor.index_bits > 8 or tensor.grid.dim > 8:
        return f"its codes have at most 8 bits for 8 weights, not {tensor.index_bits}"
    return None


def check(tensor: VQTensor) -> None:
    """Raises NotImplementedError for what the kernels cannot read, or if they cannot be built."""
    if tensor.grid.dim not in _DIMS:
        known = ", ".join(map(str, _DIMS))
        raise NotImplementedError(f"it takes vectors of {known} weights, not {tensor.grid.dim}")
    library()


def call(tensor: VQTensor, round_x: bool) -> Call:
    """The kernel for a weight of shape (R, C).

    Args:
      tensor: one that `check` accepts.
      round_x: whether x may be rounded to int8, with one scale per row.

    Raises:
      ValueError: the arrays of the tensor do not fit each other.
    """
    assert tensor.row_scales is None, "row scales are VQKernel's to apply"
    check_tensor(tensor)  # the last door: beyond it are pointers
    rows = tensor.shape[0]
    if why_not_in_registers(tensor):
        arrays, attributes = _direct_arrays(tensor), _direct(tensor)
        return Call("gptvq_vq_direct_matmul", rows, arrays, attributes)
    attributes = _geometry(tensor) | {"round_x": round_x}
    return Call("gptvq_vq_matmul", rows, _arrays(tensor), attributes)


def matmul(x: jax.Array, tensor: VQTensor, round_x: bool) -> jax.Array:
    """x (N, C), weight of shape (R, C) -> (N, R) float32.

    Args:
      x: any float dtype.
      tensor, round_x: as in `call`.

    Raises:
      ValueError: the arrays of the tensor do not fit each other, or x does not have C columns.
    """
    kernel = call(tensor, round_x)
    _check_columns(x, tensor.shape[1])
    return kernel(x)


def int4_matmul(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """x (N, C) float32, rounded to int8, times 4-bit integers -> (N, R) float32; see ops/int4.py.

    Args:
      x: C is a multiple of 128.
      codes: (R, C / 2) uint8.
      scale: (R, C / 128) float16.

    Raises:
      ValueError: the shapes do not fit each other.
    """
    rows, cols = codes.shape[0], 2 * codes.shape[1]
    _check_columns(x, cols)
    if cols % INT4_GROUP_SIZE or scale.shape != (rows, cols // INT4_GROUP_SIZE):
        raise ValueError(f"codes {codes.shape} and scales {scale.shape} are not of one weight")
    return Call("gptvq_int4_matmul", codes.shape[0], (codes, scale), {})(x)


def _check_columns(x: jax.Array, cols: int) -> None:
    if x.ndim != 2 or x.shape[1] != cols:
        raise ValueError(f"x has shape {x.shape}, the weight {cols} columns")


def _arrays(tensor: VQTensor) -> tuple[jax.Array, ...]:
    book = tensor.codebook
    centroids = book.centroids
    if book.bits == 4:
        count = book.codebook_size * book.dim
        centroids = (packing.unpack(centroids, 4, count) - 8).astype(jnp.int8)
        centroids = centroids.reshape(*book.scale.shape, book.codebook_size, book.dim)
    return tensor.codes, centroids, book.scale


def _direct_arrays(tensor: VQTensor) -> tuple[jax.Array, ...]:
    stored, grid = tensor.block_scales, tensor.grid
    scales = jnp.zeros((grid.rows, grid.col_strips, 0), jnp.float32)
    if stored is not None:
        codes = packing.unpack(stored.codes, 4, stored.blocks)
        scales = block_scale_values(codes, stored.offset[:, None], stored.step[:, None])
    return tensor.codes, tensor.codebook.values(), scales


def _geometry(tensor: VQTensor) -> dict[str, np.int64]:
    grid = tensor.grid
    sizes = {
        "strip_rows": grid.strip_rows,
        "strip_cols": grid.strip_cols,
        "bits": tensor.index_bits,
    }
    return {name: np.int64(size) for name, size in sizes.items()}


def _direct(tensor: VQTensor) -> dict[str, np.int64]:
    scales = tensor.block_scales
    return _geometry(tensor) | {"block_size": np.int64(scales.block_size if scales else 0)}
