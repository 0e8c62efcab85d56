"""Quantized tensors with random contents, of any format and size, made without any solving."""

import dataclasses

import numpy as np

from gptvq_jax.core.grid import GroupGrid, make_grid
from gptvq_jax.core.packing import packed_length
from gptvq_jax.core.vq_tensor import BlockScales, DenseCodebook, FactoredCodebook, VQTensor


@dataclasses.dataclass(frozen=True)
class TensorFormat:
    """How a weight is stored; the geometry of its groups comes from `grid`."""

    dim: int  # D
    index_bits: int  # bits of a code
    group_size: int = 0  # weights that share a codebook; 0: one codebook for all
    max_group_cols: int = 256
    codebook_bits: int = 8  # 16, 8 or 4
    rank: int = 0  # of factored codebooks (D = 1); 0: centroids stored one by one
    num_codebooks: int = 1  # M
    scale_block_size: int = 0  # weights per 4-bit block scale; 0: none
    row_scales: bool = False  # one per output

    def grid(self, rows: int, cols: int) -> GroupGrid:
        """Groups of a rows x cols weight."""
        if not self.group_size:
            return GroupGrid(rows, cols, self.dim, rows, -(-cols // self.dim) * self.dim)
        return make_grid(
            rows,
            cols,
            dim=self.dim,
            group_size=self.group_size,
            max_group_cols=self.max_group_cols,
        )


def random_tensor(fmt: TensorFormat, grid: GroupGrid, seed: int = 0) -> VQTensor:
    """A tensor of host arrays: uniform codes, weights of the size of a real layer's, about 0.02.

    Spare bits at the end of a row are random too: readers must not depend on them.
    """
    rng = np.random.default_rng(seed)
    size, books = 2**fmt.index_bits, fmt.num_codebooks
    groups = (books, grid.col_strips, grid.row_strips)

    def uniform(low, high, *shape):
        return rng.uniform(low, high, shape).astype(np.float16)

    def integers(dtype, *shape):
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, shape, dtype, endpoint=True)

    if fmt.rank:
        right = rng.normal(0, 0.5, (fmt.rank, size)).astype(np.float16)
        if fmt.codebook_bits == 16:
            left = rng.normal(0, 0.03, (*groups, fmt.rank)).astype(np.float16)
            codebook = FactoredCodebook(left, None, right)
        else:
            left = integers(np.int8, *groups, fmt.rank)
            codebook = FactoredCodebook(left, uniform(2e-4, 4e-4, fmt.rank), right)
    elif fmt.codebook_bits == 16:
        centroids = rng.normal(0, 0.02, (*groups, size, fmt.dim)).astype(np.float16)
        codebook = DenseCodebook(centroids, None, 16, size, fmt.dim)
    elif fmt.codebook_bits == 8:
        centroids = integers(np.int8, *groups, size, fmt.dim)
        codebook = DenseCodebook(centroids, uniform(2e-4, 4e-4, *groups), 8, size, fmt.dim)
    else:
        centroids = integers(np.uint8, *groups, packed_length(size * fmt.dim, 4))
        codebook = DenseCodebook(centroids, uniform(3e-3, 5e-3, *groups), 4, size, fmt.dim)
    scales = None
    if fmt.scale_block_size:
        blocks = -(-grid.strip_cols // fmt.scale_block_size)
        codes = integers(np.uint8, grid.rows, grid.col_strips, packed_length(blocks, 4))
        offset = uniform(-1, 0, grid.col_strips)
        step = uniform(0.0, 0.1, grid.col_strips)
        scales = BlockScales(codes, offset, step, fmt.scale_block_size, blocks)
    length = packed_length(grid.num_vectors, fmt.index_bits)
    codes = integers(np.uint8, books, grid.rows, length)
    row_scales = uniform(0.5, 2.0, grid.rows) if fmt.row_scales else None
    return VQTensor(codes, codebook, scales, fmt.index_bits, grid, row_scales)
