"""An embedding that is looked up in its packed codes, and multiplied with them where it is tied."""

import dataclasses

import jax
import jax.numpy as jnp

from gptvq_jax.core.check_tensor import check_tensor
from gptvq_jax.core.vq_tensor import VQTensor, take_rows
from gptvq_jax.ops.vq_matmul import VQKernel, make_kernel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedRows:
    """A quantized weight (R, C) as a leaf of the model: leaf.take(rows) and, tied, x @ leaf."""

    tensor: VQTensor
    kernel: VQKernel | None  # the same codes in the layout of a product; None where it has none

    @classmethod
    def make(cls, tensor: VQTensor, tied: bool, implementation: str = "auto") -> "CodedRows":
        """The leaf of an embedding; one that is `tied` is the head too.

        Raises:
          ValueError: the arrays of the tensor do not fit each other.
          NotImplementedError: see `vq_matmul.make_kernel`.
        """
        check_tensor(tensor)
        return cls(tensor, make_kernel(tensor, implementation) if tied else None)

    def take(self, rows: jax.Array) -> jax.Array:
        """Rows by index, (...) int -> (..., C) float32; NaN for one that does not exist."""
        count, cols = self.tensor.shape
        flat = rows.reshape(-1)
        exists = (flat >= 0) & (flat < count)
        values = take_rows(self.tensor, jnp.clip(flat, 0, count - 1))
        return jnp.where(exists[:, None], values, jnp.nan).reshape(*rows.shape, cols)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """x @ W^T, (..., C) -> (..., R) in the dtype of x.

        Raises:
          ValueError: the embedding is not tied, or x does not have C columns.
        """
        if self.kernel is None:
            raise ValueError("this embedding is no head: make it with tied=True")
        return x @ self.kernel
