"""A weight stored row by row, dense or int8: embeddings, heads and dense kernels while serving.

A kernel (in, out) is stored transposed, (out, in): at batch size 1 a CPU then multiplies 1.3 to 1.6
times as fast, and decodes float16 or int8 inside the product, at the speed of memory.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.core.check_tensor import check_tensor
from gptvq_jax.core.int8_rows import check_int8_rows
from gptvq_jax.core.vq_tensor import VQTensor

_CPU_SINGLE_ROWS = 4  # of x, up to which a CPU decodes the weight again for each
_CHUNK_VALUES = 2**20  # of the weight, decoded at once where there are more


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowWeight:
    """A weight (R, C), outputs x inputs, as a leaf of the model: x @ leaf and leaf.take(rows)."""

    values: jax.Array  # (R, C) floating point, or uint8 codes
    scale: jax.Array | None = None  # (R,) float16 with codes: row = scale * (codes - 127.5)

    @classmethod
    def from_int8_rows(cls, tensor: VQTensor) -> "RowWeight":
        """Shares the arrays of a tensor of `uniform.int8_rows`.

        Raises:
          ValueError: its arrays do not fit each other.
          NotImplementedError: it is another kind of tensor.
        """
        check_tensor(tensor)
        check_int8_rows(tensor)
        return cls(tensor.codes[0], tensor.codebook.left[0, 0, :, 0])

    def take(self, rows: jax.Array) -> jax.Array:
        """Rows by index, (...) int -> (..., C) float32; NaN for one that does not exist."""
        values = jnp.take(self.values, rows, axis=0)
        scale = None if self.scale is None else jnp.take(self.scale, rows)
        return _decode(values, scale, jnp.float32)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """x @ W^T, (..., C) -> (..., R) in the dtype of x, accumulated in float32.

        Raises:
          ValueError: x does not have C columns.
        """
        rows, cols = self.values.shape
        if x.shape[-1] != cols:
            raise ValueError(f"x has {x.shape[-1]} columns, the weight {cols}")
        y = self._matmul(x.reshape(-1, cols))
        return y.astype(x.dtype).reshape(*x.shape[:-1], rows)

    def _matmul(self, x: jax.Array) -> jax.Array:
        if self.values.dtype == x.dtype:
            # Matrix times vector is a routine of its own on a CPU; as a product of matrices it
            # becomes a loop that computes what x is made of again for every output.
            if len(x) > 1:
                return _dot(x, self.values, None)
            return jnp.matmul(self.values, x[0], precision=_precision(x.dtype))[None]
        if len(x) <= _CPU_SINGLE_ROWS and jax.default_backend() == "cpu":
            products = [_dot(row, self.values, self.scale) for row in jnp.split(x, len(x))]
            return jnp.concatenate(products)
        if self.values.size <= 2 * _CHUNK_VALUES:
            return _dot(x, self.values, self.scale)
        return self._matmul_chunked(x)

    def _matmul_chunked(self, x: jax.Array) -> jax.Array:
        """Never holds more than a chunk of the decoded weight."""
        rows, cols = self.values.shape
        size = min(rows, max(1, _CHUNK_VALUES // cols))

        def chunk(i: jax.Array, y: jax.Array) -> jax.Array:
            start = jnp.minimum(i * size, rows - size)  # the last chunk overlaps the one before
            values = lax.dynamic_slice_in_dim(self.values, start, size)
            scale = self.scale
            if scale is not None:
                scale = lax.dynamic_slice_in_dim(scale, start, size)
            return lax.dynamic_update_slice_in_dim(y, _dot(x, values, scale), start, axis=1)

        y = jnp.zeros((x.shape[0], rows), jnp.float32)
        return lax.fori_loop(0, -(-rows // size), chunk, y)


def _decode(values: jax.Array, scale: jax.Array | None, dtype) -> jax.Array:
    if scale is None:
        return values.astype(dtype)
    return ((values.astype(jnp.float32) - 127.5) * scale.astype(jnp.float32)[..., None]).astype(
        dtype
    )


def _dot(x: jax.Array, values: jax.Array, scale: jax.Array | None) -> jax.Array:
    """x (N, C), values (R, C) -> (N, R) float32."""
    weight, precision = _decode(values, scale, x.dtype), _precision(x.dtype)
    return jnp.matmul(x, weight.T, precision=precision, preferred_element_type=jnp.float32)


def _precision(dtype) -> str | None:
    return "highest" if dtype == jnp.float32 else None
