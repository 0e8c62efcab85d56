"""A quantized tensor decoded by the formulas of core, in NumPy float64, code by code."""

import numpy as np

from gptvq_jax.core.trellis_table import gaussian_values, ranks
from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.core.vq_tensor import DenseCodebook, VQTensor


def decode(tensor: VQTensor | TrellisTensor) -> np.ndarray:
    """The weight (R, C) in float64."""
    if isinstance(tensor, TrellisTensor):
        return _decode_trellis(tensor)
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


def _decode_trellis(tensor: TrellisTensor) -> np.ndarray:
    """Streams one by one, each a number whose bits go round."""
    rows, cols, bits, length = tensor.rows, tensor.cols, tensor.window_bits, tensor.stream_rows
    packed = np.asarray(tensor.rates)
    rates = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:cols].astype(int)
    table = np.asarray(gaussian_values(bits), np.float64)
    if tensor.levels is not None:
        levels = np.asarray(tensor.levels, np.float64)
        table = levels[ranks(bits) * len(levels) // 2**bits]
    weight, codes, start = np.zeros((rows, cols)), np.asarray(tensor.codes), 0
    for rate in range(1, rates.max() + 1):
        for first in range(0, rows, length):
            for j in np.flatnonzero(rates == rate):
                size = -(-length * rate // 8)
                number = int.from_bytes(codes[start : start + size].tobytes(), "little")
                number %= 2 ** (length * rate)
                number += number << length * rate  # round once, which is enough for a window
                start += size
                for r in range(first, min(first + length, rows)):
                    window = (number >> (r - first) * rate) % 2**bits
                    weight[r, j] = table[window] * tensor.col_scales[j]
    weight *= np.asarray(tensor.row_scales, np.float64)[:, None]
    if tensor.outlier_gaps is not None:
        place = 0
        for gap, value in zip(tensor.outlier_gaps, tensor.outlier_values, strict=True):
            place += int(gap)
            weight[place % rows, place // rows] += float(value)
    return weight
