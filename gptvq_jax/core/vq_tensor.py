"""The quantized weight with codebooks: one pytree for GPTVQ, AQLM and uniform grids.

    W[r, jD:(j+1)D] = s(r, j) * sum_m codebook[m, group(r, j), codes[m, r, j]]

AQLM has several codebooks m and one scale s per row r; GPTVQ one codebook per group, and scales of
rows or blocks where asked for. A uniform grid (RTN, GPTQ) is D = 1 with a codebook of rank 2:
centroid k of a group is scale * k + offset. An SVD-compressed codebook (GPTVQ, section 3.3) is the
same thing at any rank. Every array is held as it is stored, so bits per value are counted, never
computed from a formula. Axis letters are explained in grid.py.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from gptvq_jax.core import packing
from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.quantized_tensor import QuantizedTensor

_static = partial(dataclasses.field, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCodebook:
    """Centroids stored one by one: float16, int8, or int4 packed two to a byte."""

    centroids: jax.Array  # (M, S, G, K, D) float16 | int8, or (M, S, G, K * D / 2) uint8
    scale: jax.Array | None  # (M, S, G) float16, None for float16 centroids
    bits: int = _static()  # 16, 8 or 4
    codebook_size: int = _static()
    dim: int = _static()

    def values(self) -> jax.Array:
        """Centroids (M, S, G, K, D), float32."""
        centroids = jnp.asarray(self.centroids)
        if self.bits == 4:
            count = self.codebook_size * self.dim
            centroids = packing.unpack(centroids, 4, count) - 8
            centroids = centroids.reshape(*self.scale.shape, self.codebook_size, self.dim)
        centroids = centroids.astype(jnp.float32)
        if self.scale is None:
            return centroids
        return centroids * self.scale[..., None, None].astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactoredCodebook:
    """Centroids of 1D codebooks as a product of rank p: left (groups x p) @ right (p x K)."""

    left: jax.Array  # (M, S, G, p) float16 | int8
    left_scale: jax.Array | None  # (p,) float16, None for float16 factors
    right: jax.Array  # (p, K) float16

    def values(self) -> jax.Array:
        """Centroids (M, S, G, K, 1), float32."""
        left = jnp.asarray(self.left, jnp.float32)
        if self.left_scale is not None:
            left = left * self.left_scale.astype(jnp.float32)
        return jnp.matmul(left, self.right.astype(jnp.float32), precision="highest")[..., None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockScales:
    """4-bit log-domain scales of blocks of weights within a row: s = 2^(offset + step * code)."""

    codes: jax.Array  # (R, S, ceil(blocks / 2)) uint8, packed
    offset: jax.Array  # (S,) float16, log2 of the smallest scale of a column strip
    step: jax.Array  # (S,) float16
    block_size: int = _static()  # weights that share a scale
    blocks: int = _static()  # blocks in one row of a column strip

    def per_vector(self, grid: GroupGrid) -> jax.Array:
        """Scale of each vector (R, J_padded), float32."""
        codes = packing.unpack(self.codes, 4, self.blocks)
        scales = block_scale_values(codes, self.offset[:, None], self.step[:, None])
        # A block that is wider than its strip is the strip: nothing larger is ever made.
        vectors = min(self.block_size // grid.dim, grid.strip_vectors)
        scales = jnp.repeat(scales, vectors, axis=-1)[..., : grid.strip_vectors]
        return scales.reshape(grid.rows, -1)


def block_scale_values(codes: jax.Array, offset: jax.Array, step: jax.Array) -> jax.Array:
    """s = 2^(offset + step * code), broadcast, float32."""
    return jnp.exp2(offset.astype(jnp.float32) + step.astype(jnp.float32) * codes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VQTensor(QuantizedTensor):
    """A quantized (R, C) weight, outputs x inputs, exactly as stored."""

    codes: jax.Array  # (M, R, bytes) uint8: J codes of index_bits each, rows byte-aligned
    codebook: DenseCodebook | FactoredCodebook
    block_scales: BlockScales | None
    index_bits: int = _static()
    grid: GroupGrid = _static()
    row_scales: jax.Array | None = None  # (R,) float16

    @property
    def shape(self) -> tuple[int, int]:
        return self.grid.rows, self.grid.cols

    def dequantize(self) -> jax.Array:
        return dequantize(self)

    def small_codes(self) -> jax.Array:
        """What `unpack_codes` gives, in the smallest unsigned integers that hold it."""
        return packing.in_fewest_bytes(self.unpack_codes(), self.index_bits)

    def take_row_scales(self) -> tuple["VQTensor", jax.Array | None]:
        return dataclasses.replace(self, row_scales=None), self.row_scales

    def unpack_codes(self) -> jax.Array:
        """Codes (M, R, J), int32."""
        return packing.unpack(self.codes, self.index_bits, self.grid.num_vectors)


def dequantize(tensor: VQTensor, codes: jax.Array | None = None) -> jax.Array:
    """The weight (R, C) that the packed arrays stand for, float32.

    Args:
      tensor: the weight.
      codes: of it, unpacked (M, R, J), where they are at hand: its own are not read then.

    Raises:
      ValueError: the codebook or the codes have other sizes than the grid and `index_bits` say.
    """
    grid = tensor.grid
    codebook = tensor.codebook.values()  # (M, S, G, K, D)
    _check_lookup(tensor, tensor.codes if codes is None else codes, codebook.shape)
    # One flat index: XLA then loads the D values of a centroid together.
    index = flat_index(tensor, codes)
    vectors = codebook.reshape(-1, grid.dim).at[index].get(mode="promise_in_bounds")
    weight = jnp.sum(vectors, axis=0)  # (R, J, D)
    if tensor.block_scales is not None:
        scales = tensor.block_scales.per_vector(grid)[:, : grid.num_vectors]
        weight = weight * scales[..., None]
    if tensor.row_scales is not None:
        weight = weight * jnp.asarray(tensor.row_scales, jnp.float32)[:, None, None]
    return weight.reshape(grid.rows, -1)[:, : grid.cols]


def take_rows(tensor: VQTensor, rows: jax.Array) -> jax.Array:
    """Rows (n,) of the weight by index, all of which it has: (n, C) float32.

    No more is decoded than these rows, with the codebooks of their groups.
    """
    grid, strips = tensor.grid, rows // tensor.grid.strip_rows

    def of_groups(array):  # axis 2 of (M, S, G, ...)
        return jnp.take(array, strips, axis=2) if array.ndim > 2 else array

    scales = tensor.block_scales
    if scales is not None:
        scales = dataclasses.replace(scales, codes=jnp.take(scales.codes, rows, axis=0))
    part = dataclasses.replace(
        tensor,
        codes=jnp.take(tensor.codes, rows, axis=1),
        codebook=jax.tree.map(of_groups, tensor.codebook),
        block_scales=scales,
        row_scales=None if tensor.row_scales is None else jnp.take(tensor.row_scales, rows),
        grid=dataclasses.replace(grid, rows=len(rows), strip_rows=1),
    )
    return dequantize(part)


def _check_lookup(tensor: VQTensor, codes: jax.Array, codebook_shape: tuple[int, ...]) -> None:
    """Keeps the promise that every lookup makes: that it is in bounds."""
    grid, books = tensor.grid, codes.shape[0]
    expected = (books, grid.col_strips, grid.row_strips, 2**tensor.index_bits, grid.dim)
    if codebook_shape != expected or codes.shape[1] != grid.rows:
        raise ValueError(
            f"codes {codes.shape} of {tensor.index_bits} bits and {grid} need centroids "
            f"{expected}, not {codebook_shape}"
        )


def flat_index(tensor: VQTensor, codes: jax.Array | None = None) -> jax.Array:
    """Where the centroid of each vector stands among all (M * S * G * K): (M, R, J) int32.

    `codes` are as `dequantize` takes them.
    """
    grid = tensor.grid
    codes = tensor.unpack_codes() if codes is None else codes
    row_group = jnp.arange(grid.rows) // grid.strip_rows
    col_group = jnp.arange(grid.num_vectors) // grid.strip_vectors
    group = col_group * grid.row_strips + row_group[:, None]  # (R, J)
    books = jnp.arange(codes.shape[0])[:, None, None]
    group = group + books * (grid.col_strips * grid.row_strips)
    return group * 2**tensor.index_bits + codes.astype(jnp.int32)


def pack_codes(codes: jax.Array, index_bits: int, grid: GroupGrid) -> jax.Array:
    """Codes of the sweep's layout (M, S * c / D, G * r) -> stored bytes (M, R, bytes)."""
    codes = codes[:, : grid.num_vectors, : grid.rows]
    return packing.pack(jnp.swapaxes(codes, 1, 2), index_bits)


def concat_rows(tensors: Sequence[VQTensor]) -> VQTensor:
    """Stacks quantized weights of the same columns, each with codebooks of its own.

    Raises:
      ValueError: a weight but the last ends inside a row strip.
      NotImplementedError: something is shared by all rows: block scales, SVD-compressed codebooks.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first
    for tensor in tensors[:-1]:
        if tensor.grid.rows % tensor.grid.strip_rows:
            raise ValueError(
                f"{tensor.grid.rows} rows do not divide into strips of {tensor.grid.strip_rows}; "
                "choose another vq.group_size or calibration.gradient_groups"
            )
    shared = first.block_scales is not None
    if isinstance(first.codebook, FactoredCodebook):
        rights = [tensor.codebook.right for tensor in tensors]
        shared |= first.codebook.left_scale is not None
        shared |= not all(jnp.array_equal(right, rights[0]) for right in rights)
    if shared:
        raise NotImplementedError(
            "block scales and SVD-compressed codebooks are shared by all rows of a layer; "
            "set calibration.gradient_groups to 1"
        )

    def by_group(*arrays):  # axis 2 of (M, S, G, ...)
        return jnp.concatenate(arrays, axis=2) if arrays[0].ndim > 2 else arrays[0]

    return dataclasses.replace(
        first,
        codes=jnp.concatenate([tensor.codes for tensor in tensors], axis=1),
        codebook=jax.tree.map(by_group, *(tensor.codebook for tensor in tensors)),
        row_scales=None
        if first.row_scales is None
        else jnp.concatenate([tensor.row_scales for tensor in tensors]),
        grid=dataclasses.replace(first.grid, rows=sum(t.grid.rows for t in tensors)),
    )
