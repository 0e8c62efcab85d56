"""A head as int8 rows, which a C++ kernel multiplies with on CPUs."""

import dataclasses

import jax
import numpy as np

from gptvq_jax.core.int8_rows import int8_rows
from gptvq_jax.core.row_weight import RowWeight
from gptvq_jax.ops.cpu.build import library
from gptvq_jax.ops.cpu.call import Call


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Head:
    """A weight (R, C) as a leaf of the model: x @ leaf and, tied, leaf.take(rows)."""

    coded: RowWeight  # int8 rows, of products
    rows: RowWeight | None  # those that are looked up; None: the coded ones

    @classmethod
    def rounded(cls, weight: np.ndarray, tied: bool) -> "Int8Head":
        """Rounds every row of a dense weight to 256 levels of its own scale.

        Args:
          weight: (R, C), a host array.
          tied: whether rows are looked up too: these stay as they are.

        Raises:
          ValueError: as `core.int8_rows.int8_rows`.
        """
        coded = RowWeight.from_int8_rows(int8_rows(weight))
        return cls(coded, RowWeight(np.ascontiguousarray(weight)) if tied else None)

    def take(self, rows: jax.Array) -> jax.Array:
        """Rows by index, (...) int -> (..., C) float32; NaN for one that does not exist."""
        return (self.coded if self.rows is None else self.rows).take(rows)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """x @ W^T with the coded rows, (..., C) -> (..., R) in the dtype of x.

        Raises:
          ValueError: x does not have C columns.
        """
        rows, cols = self.coded.values.shape
        if x.shape[-1] != cols:
            raise ValueError(f"x has {x.shape[-1]} columns, the weight {cols}")
        arrays = self.coded.values, self.coded.scale
        y = Call("gptvq_int8_rows_matmul", rows, arrays, {})(x.reshape(-1, cols))
        return y.astype(x.dtype).reshape(*x.shape[:-1], rows)


def can_run() -> bool:
    """Whether the kernel runs here."""
    if jax.default_backend() != "cpu":
        return False
    try:
        library()
    except NotImplementedError:
        return False
    return True
