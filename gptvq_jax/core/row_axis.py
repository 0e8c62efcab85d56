"""The rows of a layer over devices: what all of them share is summed along an axis of the mesh.

Rows are independent given codebooks, so every device works on rows of its own. What is left to tell
are sums: of a codebook that all rows share, of a loss that decides when to stop. An axis without a
name is one device that has all rows; nothing is sent then, and the program is that of a move which
knows no devices.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class RowAxis:
    """Where else there are rows, inside `jax.shard_map`; hashable, so that it is static."""

    name: str | None = None  # of the mesh's axis; None: all rows are here
    rows: int = 0  # of all devices together, padding left out; of a named axis only

    def sum(self, tree: Any) -> Any:
        """Of a pytree over the devices."""
        return tree if self.name is None else lax.psum(tree, self.name)

    def max(self, values: jax.Array) -> jax.Array:
        """Over the devices, element by element."""
        return values if self.name is None else lax.pmax(values, self.name)

    def min(self, values: jax.Array) -> jax.Array:
        """Over the devices, element by element."""
        return values if self.name is None else lax.pmin(values, self.name)

    @property
    def index(self) -> int | jax.Array:
        """Number of this device, ()."""
        return 0 if self.name is None else lax.axis_index(self.name)

    def gather(self, values: jax.Array, axis: int) -> jax.Array:
        """What all devices hold, one behind the other along an axis."""
        if self.name is None:
            return values
        return lax.all_gather(values, self.name, axis=axis, tiled=True)

    def all_rows(self, values: jax.Array, axis: int = -1) -> jax.Array:
        """`gather` along the axis of rows, padding at the end cut off.

        Sums over it are taken in the order that one device takes them in: to the same last bit.
        """
        if self.name is None:
            return values
        return lax.slice_in_dim(self.gather(values, axis % values.ndim), 0, self.rows, axis=axis)

    def used(self, rows: int) -> jax.Array:
        """Which of the `rows` that are here are no padding (rows,) bool."""
        return self.index * rows + jnp.arange(rows) < self.rows


ALL_HERE = RowAxis()
