"""A layer in a rotated basis: what incoherence (QuIP#, arXiv 2402.04396) is worth to a method.

Rows and columns are multiplied by random orthogonal matrices, so that no weight and no input stands
out, and what was quantized is turned back. The loss is the same in both bases. This is for
measuring: a model would have to fold the matrices into its neighbours, or multiply by them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rotation(NamedTuple):
    """Of a layer (R, C)."""

    rows: jax.Array  # A (R, R), orthogonal
    cols: jax.Array  # B (C, C), orthogonal


def random_hadamard(size: int, generator: np.random.Generator) -> np.ndarray:
    """An orthogonal matrix (size, size) float64: random signs, then a Hadamard matrix.

    That exists for powers of two; an odd factor of the size is a random orthogonal matrix.
    """
    odd = size
    while odd % 2 == 0:
        odd //= 2
    matrix, triangle = np.linalg.qr(generator.normal(size=(odd, odd)))
    matrix = matrix * np.sign(np.diag(triangle))  # uniform over all orthogonal matrices
    while len(matrix) < size:
        matrix = np.kron(np.array([[1, 1], [1, -1]]) / np.sqrt(2), matrix)
    return matrix * generator.choice([-1.0, 1.0], size)


def random_rotation(rows: int, cols: int, seed: int) -> Rotation:
    """A randomized Hadamard transform for each side of a layer (R, C)."""
    generator = np.random.default_rng(seed)
    sides = (random_hadamard(size, generator) for size in (rows, cols))
    return Rotation(*(jnp.asarray(side, jnp.float32) for side in sides))


def rotate(
    weight: jax.Array, hessian: jax.Array, rotation: Rotation
) -> tuple[jax.Array, jax.Array]:
    """A W B^T and B H B^T of a weight (R, C) and a Hessian (C, C)."""
    a, b = rotation
    turned = _product(b, hessian, b.T)
    return _product(a, weight, b.T), (turned + turned.T) / 2


def rotate_back(quantized: jax.Array, rotation: Rotation) -> jax.Array:
    """A^T Q B: what a quantized rotated weight (R, C) stands for."""
    a, b = rotation
    return _product(a.T, quantized, b)


def _product(*factors: jax.Array) -> jax.Array:
    return jnp.linalg.multi_dot(factors, precision="highest")
