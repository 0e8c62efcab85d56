"""The C++ kernels as JAX functions of a VQTensor."""

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax import packing
from gptvq_jax.ops.cpu.build import library
from gptvq_jax.vq_tensor import DenseCodebook, VQTensor

_DIMS = (1, 2, 4, 8)
_DECODE_ROWS = 16  # of x, from which on decoding the weight once and a dense product are faster


def check(tensor: VQTensor) -> None:
    """Raises NotImplementedError for what the kernels cannot read, or if they cannot be built."""
    book = tensor.codebook
    if not isinstance(book, DenseCodebook) or book.bits == 16:
        raise NotImplementedError("its centroids must be int8 or int4")
    if tensor.block_scales is not None:
        raise NotImplementedError("it has no block scales")
    if tensor.index_bits > 8 or tensor.grid.dim not in _DIMS:
        raise NotImplementedError(
            f"it takes codes of at most 8 bits for vectors of {', '.join(map(str, _DIMS))}, not "
            f"{tensor.index_bits} bits for {tensor.grid.dim}"
        )
    library()


def matmul(x: jax.Array, tensor: VQTensor, round_x: bool) -> jax.Array:
    """x (N, C), weight of shape (R, C) -> (N, R) float32."""
    x = x.astype(jnp.float32)
    if x.shape[0] >= _DECODE_ROWS:
        return jnp.matmul(x, decode(tensor).T, precision="highest")
    shape = (x.shape[0], tensor.shape[0])
    return _call("vq_matmul", shape, x, *_arrays(tensor), **_geometry(tensor), round_x=round_x)


def decode(tensor: VQTensor) -> jax.Array:
    """The weight (R, C), float32: what `vq_tensor.dequantize` gives."""
    return _call("vq_decode", tensor.shape, *_arrays(tensor), **_geometry(tensor))


def int4_matmul(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """What vector quantization is compared with: 4-bit integers, symmetric, groups of 128.

    Args:
      x: (N, C) float32, C a multiple of 128; rounded to int8 with one scale per row.
      codes: (R, C / 2) uint8, even columns in the low bits; weight = scale (code - 8).
      scale: (R, C / 128) float16.

    Returns:
      (N, R) float32.
    """
    return _call("int4_matmul", (x.shape[0], codes.shape[0]), x, codes, scale)


def _arrays(tensor: VQTensor) -> tuple[jax.Array, jax.Array, jax.Array]:
    book = tensor.codebook
    centroids = book.centroids
    if book.bits == 4:
        count = book.codebook_size * book.dim
        centroids = (packing.unpack(centroids, 4, count) - 8).astype(jnp.int8)
        centroids = centroids.reshape(*book.scale.shape, book.codebook_size, book.dim)
    return tensor.codes, centroids, book.scale


def _geometry(tensor: VQTensor) -> dict[str, np.int64]:
    grid = tensor.grid
    sizes = {
        "strip_rows": grid.strip_rows,
        "strip_cols": grid.strip_cols,
        "bits": tensor.index_bits,
    }
    return {name: np.int64(size) for name, size in sizes.items()}


def _call(name: str, shape: tuple[int, int], *arrays: jax.Array, **attributes) -> jax.Array:
    library()
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.ffi.ffi_call(f"gptvq_{name}", result)(*arrays, **attributes)
