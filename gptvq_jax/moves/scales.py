"""Scales: 4-bit log-domain ones of blocks (GPTVQ, section 3.3), and one for each row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptvq_jax.core.row_axis import ALL_HERE, RowAxis
from gptvq_jax.core.vq_tensor import block_scale_values
from gptvq_jax.moves.residual import Residual

_LEVELS = 15  # 4-bit codes 0..15
_SMALLEST_RATIO = 2.0**-15  # of the scales of a strip: a level is at most one octave


class StripScales(NamedTuple):
    """Scales of one column strip, s = 2^(offset + step * code), as they will be stored."""

    codes: jax.Array  # (B, G, r) int32, B blocks of weights along the inputs
    offset: jax.Array  # () float16
    step: jax.Array  # () float16
    repeats: jax.Array  # (c,) int32: the block of each column

    def per_column(self) -> jax.Array:
        """(c, G, r) float32."""
        return block_scale_values(self.codes, self.offset, self.step)[self.repeats]

    def per_vector(self, dim: int) -> jax.Array:
        """(c / D, G, r) float32: a vector never straddles two blocks."""
        return self.per_column()[::dim]


def normalize_strip(weight: jax.Array, block_size: int, axis: RowAxis = ALL_HERE) -> StripScales:
    """Scales that bring the largest weight of every block near 1.

    Args:
      weight: (c, G, r), one column strip; each row is cut into blocks of `block_size` inputs.
      block_size: weights per scale; the last block of a strip may be shorter.
      axis: where more rows of the strip are.
    """
    cols = weight.shape[0]
    blocks = -(-cols // block_size)
    padded = jnp.pad(weight, ((0, blocks * block_size - cols), (0, 0), (0, 0)))
    peak = jnp.max(jnp.abs(padded.reshape(blocks, block_size, *weight.shape[1:])), axis=1)
    # An all-zero block (rows of padding, dead columns) takes the smallest real scale, and an almost
    # zero one must not stretch the 16 levels.
    top = axis.max(jnp.max(peak))
    bottom = axis.min(jnp.min(jnp.where(peak > 0, peak, jnp.inf)))
    floor = jnp.where(top > 0, jnp.maximum(bottom, top * _SMALLEST_RATIO), 1.0)
    log = jnp.log2(jnp.maximum(peak, floor))
    lowest, highest = axis.min(jnp.min(log)), axis.max(jnp.max(log))
    offset = lowest.astype(jnp.float16)
    step = ((highest - lowest) / _LEVELS).astype(jnp.float16)
    spacing = jnp.where(step > 0, step.astype(jnp.float32), 1.0)
    codes = jnp.round((log - offset.astype(jnp.float32)) / spacing)
    codes = jnp.clip(codes, 0, _LEVELS).astype(jnp.int32)
    return StripScales(codes, offset, step, jnp.arange(cols) // block_size)


class RowScales(NamedTuple):
    """Scales of whole rows, as a sweep takes them."""

    columns: jax.Array  # (c, G, r), the same in every column

    def per_vector(self, dim: int) -> jax.Array:
        """(c / D, G, r) float32."""
        return self.columns[::dim]


def row_norms(weight: jax.Array) -> jax.Array:
    """Root mean square of every row, as stored in float16; 1 for rows of zeros.

    Args:
      weight: (S * c, G * r), transposed.
    """
    size = jnp.sqrt(jnp.mean(jnp.square(weight), axis=0)).astype(jnp.float16).astype(jnp.float32)
    return jnp.where(size > 0, size, 1.0)


def refit_row_scales(
    residual: Residual, whole: Residual, scale: jax.Array
) -> tuple[jax.Array, Residual]:
    """Least-squares scales of the rows, as stored in float16; no row's loss rises.

    With E = W - Q, the loss is quadratic in a factor a of a row q of Q: a = 1 + q H e / q H q.
    H q = H w - H e is known, so that no product with H is made.

    Args:
      residual: of Q.
      whole: that of Q = 0: the weight and its image.
      scale: (G * r,) those that Q was made with, float16 numbers; kept where a row has no output
        or its best scale is 0.

    Returns:
      Scales, and the residual with them.
    """
    quantized, image = whole.error - residual.error, whole.image - residual.image
    energy = jnp.sum(quantized * image, axis=0)
    gain = jnp.sum(quantized * residual.image, axis=0)
    best = scale * (1 + gain / jnp.where(energy > 0, energy, 1.0))
    best = best.astype(jnp.float16).astype(jnp.float32)
    new = jnp.where((energy > 0) & (best != 0) & jnp.isfinite(best), best, scale)
    less = (scale - new) / scale
    return new, Residual(residual.error + less * quantized, residual.image + less * image)
