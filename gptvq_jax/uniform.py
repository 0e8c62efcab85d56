"""Uniform grids with groups: GPTQ (arXiv 2210.17323), round-to-nearest, and int8 embeddings."""

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.grid import GroupGrid
from gptvq_jax.moves.sweep import pad_identity, sweep
from gptvq_jax.moves.uniform import basis, factored, uniform_fit, uniform_grid
from gptvq_jax.vq_tensor import FactoredCodebook, VQTensor, dequantize_compiled, pack_codes

_CHUNK_VALUES = 2**20  # of an embedding, rounded or dequantized at once


@dataclasses.dataclass(frozen=True)
class UniformSettings:
    """A uniform grid per group of consecutive inputs of a row."""

    bits: int = 3  # bits of a code
    group_size: int = 128  # inputs that share a scale; 0: a whole row
    symmetric: bool = False  # True: no offset, 16 bits less per group
    block_size: int = 128  # columns per lazy update of the sweep

    def __post_init__(self):
        if not 1 <= self.bits <= 8:
            raise ValueError(f"uniform.bits={self.bits} must be 1 to 8")
        if self.group_size < 0:
            raise ValueError(f"uniform.group_size={self.group_size} must be at least 0")
        if self.block_size < 1:
            raise ValueError(f"uniform.block_size={self.block_size} must be at least 1")

    def grid(self, rows: int, cols: int) -> GroupGrid:
        """Groups of a rows x cols weight."""
        return uniform_grid(rows, cols, self.group_size)


@partial(jax.jit, static_argnames="settings")
def gptq(
    weight: jax.Array,
    hessian: jax.Array,
    hinv_chol: jax.Array,
    key: jax.Array,
    settings: UniformSettings,
) -> VQTensor:
    """Rounds column by column and feeds the error forward through hinv_chol.

    Args:
      weight: (R, C).
      hessian: not used; here so that every method has one signature.
      hinv_chol: (C, C) U of the damped Hessian, in any unit.
      key: not used.
      settings: bits and groups.
    """
    del hessian
    grid = settings.grid(*weight.shape)
    result = sweep(
        grid.pad_transpose(weight),
        pad_identity(hinv_chol, grid),
        grid,
        uniform_fit(2**settings.bits, settings.symmetric),
        key,
        block_size=settings.block_size,
    )
    return VQTensor(
        codes=pack_codes(result.codes[None], settings.bits, grid),
        codebook=factored(result.centroids[None], settings.symmetric),
        block_scales=None,
        index_bits=settings.bits,
        grid=grid,
    )


def rtn(
    weight: jax.Array,
    hessian: jax.Array,
    hinv_chol: jax.Array,
    key: jax.Array,
    settings: UniformSettings,
) -> VQTensor:
    """Rounds every weight to the nearest level: the same sweep with nothing fed forward."""
    return gptq(weight, hessian, jnp.eye(hinv_chol.shape[0]), key, settings)


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


def check_int8_rows(tensor: VQTensor) -> None:
    """Raises NotImplementedError for a tensor of host arrays that `int8_rows` does not make."""
    book = tensor.codebook
    if (
        not isinstance(book, FactoredCodebook)
        or tensor.index_bits != 8
        or tensor.block_scales is not None
        or tensor.row_scales is not None
        or book.left_scale is not None
        or book.left.shape != (1, 1, tensor.grid.rows, 1)
        or not np.array_equal(book.right, basis(256, symmetric=True))
    ):
        raise NotImplementedError("an embedding must be dense or int8 rows (uniform.int8_rows)")


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
