"""The objective of every method here, and the numbers reported for it."""

import jax
import jax.numpy as jnp

from gptvq_jax.core.hessian import power_of_two, unit


def quadratic_loss(weight: jax.Array, quantized: jax.Array, hessian: jax.Array) -> jax.Array:
    """L(Q) = tr((W - Q) H (W - Q)^T): mean squared error of a layer's outputs, summed over outputs.

    Multiplied and summed in float32, whatever the dtypes.

    Args:
      weight, quantized: (R, C).
      hessian: (C, C) mean x x^T.
    """
    error = weight.astype(jnp.float32) - quantized.astype(jnp.float32)
    hessian = hessian.astype(jnp.float32)
    return jnp.sum(jnp.matmul(error, hessian, precision="highest") * error)


def loss_of_any_size(weight: jax.Array, quantized: jax.Array, hessian: jax.Array) -> float:
    """`quadratic_loss` where its squares, or a Hessian in an odd unit, are beyond float32."""
    loss, of_weight, of_hessian = map(float, _loss_in_units(weight, quantized, hessian))
    return loss * of_weight**2 * of_hessian


@jax.jit
def _loss_in_units(weight, quantized, hessian):
    units = power_of_two(jnp.max(jnp.abs(weight))), unit(hessian)
    loss = quadratic_loss(weight / units[0], quantized / units[0], hessian / units[1])
    return loss, *units


def relative_error(weight: jax.Array, quantized: jax.Array, hessian: jax.Array) -> jax.Array:
    """L(Q) / tr(W H W^T), 0 for an exact copy and 1 for Q = 0; 0 where the layer's output is 0."""
    size, hessian = power_of_two(jnp.max(jnp.abs(weight))), hessian / unit(hessian)
    weight, quantized = weight / size, quantized / size
    signal = quadratic_loss(weight, jnp.zeros_like(weight), hessian)
    return quadratic_loss(weight, quantized, hessian) / jnp.where(signal > 0, signal, 1.0)


def sqnr_db(relative: jax.Array | float) -> jax.Array:
    """Signal to quantization noise ratio in dB, -10 log10 of the relative error."""
    return -10 * jnp.log10(relative)
