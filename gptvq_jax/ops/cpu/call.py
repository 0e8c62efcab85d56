"""A product with a packed weight as one call of a C++ kernel: by itself, or within a larger one."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptvq_jax.ops.cpu.build import library


class Call(NamedTuple):
    """x (N, C) times a weight (R, C): what a kernel is called with beside x.

    Attributes:
      target: of jax.ffi.
      rows: R.
      arrays: of the weight.
      attributes: of the call.
    """

    target: str
    rows: int
    arrays: tuple[jax.Array, ...]
    attributes: Mapping[str, Any]

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, C), any float dtype -> (N, R) float32."""
        library()
        result = jax.ShapeDtypeStruct((x.shape[0], self.rows), jnp.float32)
        call = jax.ffi.ffi_call(self.target, result)
        return call(x.astype(jnp.float32), *self.arrays, **self.attributes)
