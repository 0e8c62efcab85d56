"""What every kind of quantized weight has in common; who asks for it need not know the kinds."""

import abc

import jax


class QuantizedTensor(abc.ABC):
    """A quantized (R, C) weight, outputs x inputs, held exactly as it is stored: a pytree."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(R, C)."""

    @abc.abstractmethod
    def dequantize(self) -> jax.Array:
        """The weight (R, C) that the arrays stand for, float32.

        Raises:
          ValueError: they do not fit each other.
        """

    @abc.abstractmethod
    def take_row_scales(self) -> tuple["QuantizedTensor", jax.Array | None]:
        """The tensor without factors of whole rows, and those: (R,), or None."""

    def for_compilation(self) -> "QuantizedTensor":
        """An equal tensor whose arrays have fewer possible sizes."""
        return self

    @property
    def num_values(self) -> int:
        rows, cols = self.shape
        return rows * cols

    @property
    def num_bytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_value(self) -> float:
        """8 x the bytes of every stored array / weights."""
        return 8 * self.num_bytes / self.num_values


_dequantize = jax.jit(lambda tensor: tensor.dequantize())


def dequantize_compiled(tensor: QuantizedTensor) -> jax.Array:
    """`tensor.dequantize()` where it is not part of a larger program."""
    return _dequantize(tensor.for_compilation())
