"""Codebooks in few bits: int8 or int4 centroids, and SVD of 1D codebooks (GPTVQ, section 3.3)."""

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.core import packing
from gptvq_jax.core.row_axis import ALL_HERE, RowAxis
from gptvq_jax.core.vq_tensor import DenseCodebook, FactoredCodebook


def quantize_centroids(centroids: jax.Array, bits: int) -> DenseCodebook:
    """Symmetric rounding with one float16 scale per codebook.

    Args:
      centroids: (M, S, G, K, D) float32.
      bits: 16 (float16, no scale), 8 or 4.
    """
    size, dim = centroids.shape[-2:]
    if bits == 16:
        return DenseCodebook(centroids.astype(jnp.float16), None, 16, size, dim)
    if bits not in (4, 8):
        raise ValueError(f"codebook bits={bits} must be 16, 8 or 4")
    top = 2 ** (bits - 1) - 1
    peak = jnp.max(jnp.abs(centroids), axis=(-2, -1))
    scale = spanning_scale(jnp.maximum(peak / top, FLOAT16_STEP))
    codes = jnp.round(centroids / scale[..., None, None].astype(jnp.float32))
    codes = jnp.clip(codes, -top - 1, top).astype(jnp.int8)
    if bits == 4:
        flat = codes.reshape(*scale.shape, size * dim).astype(jnp.int32) + 8
        return DenseCodebook(packing.pack(flat, 4), scale, 4, size, dim)
    return DenseCodebook(codes, scale, 8, size, dim)


FLOAT16_STEP = 2.0**-24  # between the smallest float16 numbers, and the first of them


def spanning_scale(scale: jax.Array) -> jax.Array:
    """In float16; rounded up where fewer than 4 bits are left, lest what it spans be clipped."""
    steps = jnp.ceil(scale / FLOAT16_STEP)
    return jnp.where(steps < 16, steps * FLOAT16_STEP, scale).astype(jnp.float16)


def sort_codebook(centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """1D centroids in rising order, which is what makes many codebooks one low-rank matrix.

    Args:
      centroids: (..., K, 1).

    Returns:
      Sorted centroids and `rank` (..., K): the new index of each old one.
    """
    order = jnp.argsort(centroids[..., 0], axis=-1)
    return jnp.take_along_axis(centroids, order[..., None], axis=-2), jnp.argsort(order, axis=-1)


def svd_factors(
    centroids: jax.Array, rank: int, axis: RowAxis = ALL_HERE
) -> tuple[jax.Array, jax.Array]:
    """Best rank-p factors of all 1D codebooks together: (M, S, G, p) and (p, K).

    Args:
      centroids: (M, S, G, K, 1), each sorted.
      rank: p, at most K.
      axis: where more row strips are; each device makes the factors of all, and keeps its own.
    """
    strips = centroids.shape[2]
    centroids = axis.gather(centroids, 2)
    *lead, size, _ = centroids.shape
    left, singular, right = jnp.linalg.svd(centroids.reshape(-1, size), full_matrices=False)
    rank = min(rank, singular.shape[0])
    # The root of the singular values on both sides keeps the factors of like magnitude.
    root = jnp.sqrt(singular[:rank])
    left = (left[:, :rank] * root).reshape(*lead, rank)
    left = lax.dynamic_slice_in_dim(left, axis.index * strips, strips, 2)
    return left, root[:, None] * right[:rank]


def quantize_factors(
    left: jax.Array, right: jax.Array, bits: int, axis: RowAxis = ALL_HERE
) -> FactoredCodebook:
    """Stores the many left factors in int8 (or float16) and the few right factors in float16.

    `axis` is where more left factors are.
    """
    if bits == 16:
        return FactoredCodebook(left.astype(jnp.float16), None, right.astype(jnp.float16))
    if bits != 8:
        raise ValueError(f"codebook bits={bits} must be 16 or 8 for SVD-compressed codebooks")
    peak = axis.max(jnp.max(jnp.abs(left), axis=tuple(range(left.ndim - 1))))
    scale = spanning_scale(jnp.maximum(peak / 127, FLOAT16_STEP))
    codes = jnp.round(left / scale.astype(jnp.float32))
    return FactoredCodebook(
        jnp.clip(codes, -128, 127).astype(jnp.int8), scale, right.astype(jnp.float16)
    )
