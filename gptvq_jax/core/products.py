"""Matrix products of float32 arrays at a precision that is named.

What a name says is done on every kind of device, by the operands alone: their sums are float32, and
products of two bfloat16 numbers are exact in float32. XLA's presets of the same names
(`jax.lax.DotAlgorithmPreset`) are not used: on a CPU they multiply as float32.
"""

import jax
import jax.numpy as jnp
from jax import lax

FLOAT32 = "float32"  # as float32; an accelerator would round the operands by default
BFLOAT16 = "bfloat16"  # both operands rounded to bfloat16: errors of 2^-9 of each
BFLOAT16X3 = "bfloat16x3"  # three such products, which together lose about 2^-17 of each
PRODUCTS = (FLOAT32, BFLOAT16, BFLOAT16X3)


def matmul(x: jax.Array, y: jax.Array, products: str = FLOAT32) -> jax.Array:
    """x @ y in float32, of arrays (..., n, k) and (..., k, m).

    Raises:
      ValueError: `products` is none of PRODUCTS.
    """
    if products == FLOAT32:
        return jnp.matmul(x, y, precision="highest")
    if products == BFLOAT16:
        return _narrow(_rounded(x), _rounded(y))
    if products == BFLOAT16X3:
        # x y = (x1 + x2) (y1 + y2) without x2 y2, the small terms summed first.
        (x1, x2), (y1, y2) = _halves(x), _halves(y)
        return _narrow(x1, y1) + (_narrow(x1, y2) + _narrow(x2, y1))
    raise ValueError(f"{products=} must be one of {', '.join(PRODUCTS)}")


def _narrow(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x = first + second + about 2^-17 of x."""
    # Not a cast there and back, which XLA takes for nothing.
    first = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return _rounded(first), _rounded(x - first)


def _rounded(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16)
