"""A quantized tensor decoded by the formula of vq_tensor.py, in NumPy float64, code by code."""

import numpy as np

from gptvq_jax.core.vq_tensor import DenseCodebook, VQTensor


def decode(tensor: VQTensor) -> np.ndarray:
    """The weight (R, C) in float64."""
    grid, books = tensor.grid, _centroids(tensor)
    codes = np.asarray(tensor.codes)
    dim = grid.dim
    weight = np.zeros((grid.rows, grid.num_vectors * dim))
    for book in range(codes.shape[0]):
        for r in range(grid.rows):
            number = int.from_bytes(codes[book, r].tobytes(), "little")
            for j in range(grid.num_vectors):
                code = (number >> (j * tensor.index_bits)) % 2**tensor.index_bits
                group = j * dim // grid.strip_cols, r // grid.strip_rows
                weight[r, j * dim : (j + 1) * dim] += books[book, *group, code]
    if tensor.block_scales is not None:
        weight *= _scales(tensor)[:, : weight.shape[1]]
    if tensor.row_scales is not None:
        weight *= np.asarray(tensor.row_scales, np.float64)[:, None]
    return weight[:, : grid.cols]


def _centroids(tensor: VQTensor) -> np.ndarray:
    """(M, S, G, K, D) float64."""
    book = tensor.codebook
    if not isinstance(book, DenseCodebook):
        left = np.asarray(book.left, np.float64)
        if book.left_scale is not None:
            left = left * np.asarray(book.left_scale, np.float64)
        return (left @ np.asarray(book.right, np.float64))[..., None]
    stored = np.asarray(book.centroids)
    if book.bits == 16:
        return stored.astype(np.float64)
    if book.bits == 4:
        nibbles = np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:-1], -1)
        nibbles = nibbles[..., : book.codebook_size * book.dim].astype(np.float64) - 8
        stored = nibbles.reshape(*stored.shape[:3], book.codebook_size, book.dim)
    return stored * np.asarray(book.scale, np.float64)[..., None, None]


def _scales(tensor: VQTensor) -> np.ndarray:
    """Scale of every weight (R, columns of all strips)."""
    grid, stored = tensor.grid, tensor.block_scales
    packed = np.asarray(stored.codes)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(grid.rows, grid.col_strips, -1)
    exponent = np.asarray(stored.offset, np.float64)[:, None]
    exponent = exponent + np.asarray(stored.step, np.float64)[:, None] * codes
    per_weight = np.repeat(2.0**exponent, stored.block_size, axis=-1)[..., : grid.strip_cols]
    return per_weight.reshape(grid.rows, -1)
