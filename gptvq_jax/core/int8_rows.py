"""Embeddings as int8 rows: every row on 256 levels of its own scale."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from gptvq_jax.core.quantized_tensor import QuantizedTensor, dequantize_compiled
from gptvq_jax.core.uniform_grid import basis, uniform_grid
from gptvq_jax.core.vq_tensor import FactoredCodebook, VQTensor

_CHUNK_VALUES = 2**20  # of an embedding, rounded or dequantized at once


def int8_rows(weight: np.ndarray) -> VQTensor:
    """Rounds every row to the nearest of 256 levels, scale * (k - 127.5), with its own scale.

    The symmetric grid of `rtn` at 8 bits, without its column loop: an embedding has far too many
    rows for one. Work is on the host, a few rows at a time; beside the result it takes little
    memory. A scale is the smallest float16 whose grid spans the row, so every entry is within half
    a step of its level. A row within half the smallest possible level of 0 is stored as zeros.

    Args:
      weight: (R, C), such as an embedding (vocab, hidden).

    Returns:
      A tensor of host arrays.

    Raises:
      ValueError: an entry is not finite, or too large for a float16 scale.
    """
    rows, cols = weight.shape
    grid = uniform_grid(rows, cols, group_size=0)
    codes = np.empty((1, rows, cols), np.uint8)  # a code of 8 bits is its own packed byte
    scale = np.empty((1, 1, rows, 1), np.float16)
    for part in _row_chunks(rows, cols):
        values = np.asarray(weight[part], np.float32)
        peak = np.max(np.abs(values), axis=1, keepdims=True)
        scale[0, 0, part] = _spanning_scale(peak)
        step = scale[0, 0, part].astype(np.float32)
        if not np.isfinite(step).all():
            raise ValueError(f"{peak.max():.3g} is beyond the range of int8 rows, 8.35e+06")
        level = np.floor(values / np.where(step > 0, step, 1)) + 128
        codes[0, part] = np.clip(level, 0, 255)
    right = np.asarray(basis(256, symmetric=True), np.float16)
    return VQTensor(codes, FactoredCodebook(scale, None, right), None, 8, grid)


def check_int8_rows(tensor: QuantizedTensor) -> None:
    """Raises NotImplementedError for a tensor of host arrays that `int8_rows` does not make."""
    book = getattr(tensor, "codebook", None)
    if (
        not isinstance(book, FactoredCodebook)
        or tensor.index_bits != 8
        or tensor.block_scales is not None
        or tensor.row_scales is not None
        or book.left_scale is not None
        or book.left.shape != (1, 1, tensor.grid.rows, 1)
        or not np.array_equal(book.right, basis(256, symmetric=True))
    ):
        raise NotImplementedError("it is not what int8_rows makes")


def is_int8_rows(tensor: QuantizedTensor) -> bool:
    """Whether `int8_rows` makes such tensors."""
    try:
        check_int8_rows(tensor)
    except NotImplementedError:
        return False
    return True


def dequantize_rows(tensor: VQTensor) -> np.ndarray:
    """What `dequantize` gives, (R, C) float32, for a tensor of `int8_rows`; on the host.

    It works on a few rows at a time, so that a device never holds a whole embedding.
    """
    rows, cols = tensor.shape
    weight = np.empty((rows, cols), np.float32)
    for part in _row_chunks(rows, cols):
        codebook = dataclasses.replace(tensor.codebook, left=tensor.codebook.left[:, :, part])
        grid = dataclasses.replace(tensor.grid, rows=codebook.left.shape[2])
        chunk = dataclasses.replace(
            tensor, codes=tensor.codes[:, part], codebook=codebook, grid=grid
        )
        weight[part] = dequantize_compiled(chunk)
    return weight


def _spanning_scale(peak: np.ndarray) -> np.ndarray:
    """Smallest float16 scales with 127.5 * scale >= peak, inf where there is none."""
    with np.errstate(over="ignore"):  # the caller looks for inf
        scale = (peak / np.float32(127.5)).astype(np.float16)
        short = scale.astype(np.float32) * np.float32(127.5) < peak  # exact: 11 bits times 8
        scale = np.where(short, np.nextafter(scale, np.float16(np.inf)), scale)
    # The lowest level of the smallest scale is half of it: below half of that, 0 is nearer.
    tiny = np.finfo(np.float16).smallest_subnormal / np.float32(4)
    return np.where(peak < tiny, np.float16(0), scale)


def _row_chunks(rows: int, cols: int) -> Iterator[slice]:
    size = max(1, _CHUNK_VALUES // cols)
    return (slice(start, start + size) for start in range(0, rows, size))
