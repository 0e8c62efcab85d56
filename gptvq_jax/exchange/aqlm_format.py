"""Quantized layers as the aqlm package stores them: a VQTensor as three arrays, and back.

    codes      (R, J, M) int8 | int16   of B bits, two's complement: v stands for v mod 2^B
    codebooks  (M, 2^B, 1, D) float16
    scales     (R, 1, 1, 1) float16     one per output

This is what transformers loads where a config.json says quant_method 'aqlm' (Egiazarian et al.,
arXiv 2401.06118). B, D and M are the same in all layers of a model. Axis letters are explained in
grid.py.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from gptvq_jax.core.check_tensor import check_tensor, check_values
from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.packing import pack
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.core.vq_tensor import DenseCodebook, VQTensor
from gptvq_jax.storage.tree_io import cast_dense

_pack = jax.jit(pack, static_argnames="bits")  # compiled, it makes no 32-bit copy of every bit


class AQLMFormat(NamedTuple):
    """What the layers of a model have in common."""

    num_codebooks: int  # M
    index_bits: int  # B
    dim: int  # D

    def __str__(self) -> str:
        return f"{self.num_codebooks} x {self.index_bits} bits, D = {self.dim}"

    @property
    def code_dtype(self) -> np.dtype:
        """The smallest signed integers that hold codes of `index_bits` bits."""
        return np.dtype(np.int8 if self.index_bits <= 8 else np.int16)

    def shapes(self, rows: int, cols: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the arrays of a layer.

        Raises:
          ValueError: D does not divide `cols`.
        """
        books, bits, dim = self
        if cols % dim:
            raise ValueError(f"{cols} inputs are not divisible into vectors of {dim}")
        return {
            "codes": (rows, cols // dim, books),
            "codebooks": (books, 2**bits, 1, dim),
            "scales": (rows, 1, 1, 1),
        }


def aqlm_format(tensor: QuantizedTensor) -> AQLMFormat:
    """The format that a tensor takes; looks at no array but for its shape.

    Raises:
      NotImplementedError: it has none; the message continues a sentence that begins with its name.
    """
    if not isinstance(tensor, VQTensor):
        raise NotImplementedError("has trellis codes, not codebooks; quantize with method 'aqlm'")
    grid = tensor.grid
    groups = grid.row_strips * grid.col_strips
    if not isinstance(tensor.codebook, DenseCodebook):
        reason = "has a uniform grid or SVD-compressed codebooks; quantize with method 'aqlm'"
    elif tensor.block_scales is not None:
        reason = "has scales of blocks; quantize with vq.scale_block_size=0, or with method 'aqlm'"
    elif groups > 1:
        reason = (
            f"has {groups} codebook groups, not 1; quantize with method 'aqlm', or with "
            "vq.group_size and vq.max_group_cols as large as the largest layer"
        )
    elif grid.cols % grid.dim:
        reason = (
            f"has {grid.cols} inputs, which vectors of {grid.dim} do not divide; quantize with "
            "vectors that do"
        )
    else:
        return AQLMFormat(tensor.codes.shape[0], tensor.index_bits, grid.dim)
    raise NotImplementedError(reason)


def to_aqlm(tensor: VQTensor) -> dict[str, np.ndarray]:
    """{"codes", "codebooks", "scales"} of a layer.

    Nothing is rounded where centroids are float16, nor where there is one codebook of integers,
    whose scale becomes that of every row. Integers of several codebooks, or beside scales of rows,
    are multiplied by the scales of their codebooks and rounded to float16.

    Raises:
      NotImplementedError: see `aqlm_format`.
      ValueError: a centroid is too large for float16.
    """
    fmt = aqlm_format(tensor)
    rows = tensor.grid.rows
    codebook, scales = tensor.codebook, tensor.row_scales
    if codebook.scale is not None and fmt.num_codebooks == 1 and scales is None:
        scales = np.full(rows, np.asarray(codebook.scale).item(), np.float16)
        codebook = dataclasses.replace(codebook, scale=np.ones_like(codebook.scale))
    elif scales is None:
        scales = np.ones(rows, np.float16)
    shapes = fmt.shapes(*tensor.shape)
    codes = np.moveaxis(np.asarray(tensor.unpack_codes()), 0, -1)
    sign = 2 ** (fmt.index_bits - 1)
    signed = (codes ^ sign) - sign  # the highest of the bits counts -2^(B-1)
    return {
        "codes": np.ascontiguousarray(signed, fmt.code_dtype),
        "codebooks": cast_dense(codebook.values(), "float16", "codebooks").reshape(
            shapes["codebooks"]
        ),
        "scales": np.asarray(scales, np.float16).reshape(shapes["scales"]),
    }


def from_aqlm(
    fmt: AQLMFormat, codes: np.ndarray, codebooks: np.ndarray, scales: np.ndarray
) -> VQTensor:
    """The tensor of host arrays that a layer's three arrays, of `fmt.shapes`, stand for.

    Raises:
      ValueError: a code is out of range, or a codebook or scale is not finite.
    """
    books, bits, dim = fmt
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    outside = codes[(codes < low) | (codes > high)]
    if outside.size:
        raise ValueError(
            f"{outside.size} codes are out of range, the first is {outside[0]}: {bits} bits hold "
            f"{low} to {high}"
        )
    rows, vectors, _ = codes.shape
    cols = vectors * dim
    unsigned = np.moveaxis(codes, -1, 0).astype(np.uint16) & (2**bits - 1)  # (M, R, J)
    centroids = np.asarray(codebooks, np.float16).reshape(books, 1, 1, 2**bits, dim)
    tensor = VQTensor(
        codes=np.asarray(_pack(unsigned, bits)),
        codebook=DenseCodebook(centroids, None, 16, 2**bits, dim),
        block_scales=None,
        index_bits=bits,
        grid=GroupGrid(rows, cols, dim, rows, cols),
        row_scales=np.asarray(scales, np.float16).reshape(rows),
    )
    check_tensor(tensor)
    check_values(tensor)
    return tensor
