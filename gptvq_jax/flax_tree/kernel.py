"""A quantized kernel in a parameter tree: packed matrices, and how they make the stored array."""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.ops.vq_matmul import VQKernel, make_kernel

_static = partial(dataclasses.field, metadata={"static": True})


class Layout(NamedTuple):
    """Axes of a kernel by what its products do with them; those in neither are outputs."""

    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]  # a matrix for each index: stacked layers, experts
    in_axes: tuple[int, ...]  # contracted

    @property
    def out_axes(self) -> tuple[int, ...]:
        other = {*self.batch_axes, *self.in_axes}
        return tuple(axis for axis in range(len(self.shape)) if axis not in other)

    def size(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.shape[axis] for axis in axes)

    @property
    def count(self) -> int:
        """B: matrices."""
        return self.size(self.batch_axes)

    @property
    def matrix(self) -> tuple[int, int]:
        """(R, C), outputs x inputs."""
        return self.size(self.out_axes), self.size(self.in_axes)

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.batch_axes, *self.out_axes, *self.in_axes)

    def matrices(self, kernel: jax.Array) -> jax.Array:
        """(B, R, C) of a kernel."""
        return kernel.transpose(self._order).reshape(self.count, *self.matrix)

    def kernel(self, matrices: jax.Array) -> jax.Array:
        """Inverse of `matrices`."""
        order = self._order
        stored = matrices.reshape([self.shape[axis] for axis in order])
        return stored.transpose([order.index(axis) for axis in range(len(order))])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedKernel:
    """A leaf in the place of a dense kernel, to be read by `gptvq_jax.packed`; a pytree."""

    tensors: tuple[QuantizedTensor | VQKernel, ...]  # B of shape (R, C)
    layout: Layout = _static()
    dtype: Any = _static()  # of the kernel

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.layout.shape

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def bits_per_value(self) -> float:
        """8 x the bytes of every stored array / weights."""
        return 8 * self.num_bytes / self.num_values

    def dequantize(self) -> jax.Array:
        """The dense kernel that the arrays stand for.

        Raises:
          ValueError: they are ready for a product, and cannot be read back.
        """
        if any(isinstance(tensor, VQKernel) for tensor in self.tensors):
            raise ValueError("a kernel of flax_tree.ready is not read back; keep the packed tree")
        matrices = jnp.stack([tensor.dequantize() for tensor in self.tensors])
        return self.layout.kernel(matrices).astype(self.dtype)

    def ready(self, implementation: str) -> "PackedKernel":
        """In the layout that an implementation of products reads."""
        made = (make_kernel(tensor, implementation) for tensor in self.tensors)
        return dataclasses.replace(self, tensors=tuple(made))


def is_packed(leaf: Any) -> bool:
    return isinstance(leaf, PackedKernel)
