"""Quantized tensors with random contents, of any format and size, made without any solving."""

import dataclasses

import numpy as np

from gptvq_jax.core.grid import GroupGrid, make_grid
from gptvq_jax.core.packing import pack, packed_length
from gptvq_jax.core.trellis_tensor import MAX_RATE, TrellisTensor, stream_bytes
from gptvq_jax.core.vq_tensor import BlockScales, DenseCodebook, FactoredCodebook, VQTensor
from gptvq_jax.methods.trellis_settings import TrellisSettings


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


@dataclasses.dataclass(frozen=True)
class TrellisFormat:
    """Trellis codes as the method makes them: rates near one, and an outlier in 2000 weights."""

    rate: int  # bits of half of the columns; a quarter has one less, a quarter one more
    window_bits: int = 12  # L

    def random(self, rows: int, cols: int, seed: int = 0) -> TrellisTensor:
        """A tensor of host arrays, in streams of about 256 rows."""
        settings = TrellisSettings(window_bits=self.window_bits)
        return random_trellis(
            rows,
            cols,
            window_bits=self.window_bits,
            stream_rows=settings.rows_of_stream(rows),
            outliers=rows * cols // 2000,
            rates=self.rate + np.random.default_rng(seed).choice([-1, 0, 0, 1], cols),
            seed=seed,
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


def random_trellis(
    rows: int,
    cols: int,
    window_bits: int = 8,
    stream_rows: int = 16,
    outliers: int = 3,
    level_bits: int = 0,
    rates: np.ndarray | None = None,
    seed: int = 0,
) -> TrellisTensor:
    """Trellis codes of host arrays: uniform streams, weights of about 0.02.

    Args:
      rows, cols: R and C.
      window_bits: L.
      stream_rows: T.
      outliers: N.
      level_bits: B of learned levels; 0: the table of quantiles.
      rates: K_j (C,); by default uniform from 0 up.
      seed: of everything.
    """
    rng = np.random.default_rng(seed)
    if rates is None:
        rates = rng.integers(0, min(MAX_RATE, window_bits) + 1, cols)
    size = -(-rows // stream_rows) * int(stream_bytes(rates, stream_rows).sum())
    gaps = rng.integers(0, rows * cols // (outliers + 1) + 1, outliers).astype(np.uint16)
    return TrellisTensor(
        codes=rng.integers(0, 256, max(1, size)).astype(np.uint8),
        rates=np.asarray(pack(rates, 4)),
        row_scales=rng.uniform(0.01, 0.03, rows).astype(np.float16),
        col_scales=rng.uniform(0.5, 1.5, cols).astype(np.float16),
        levels=rng.normal(size=2**level_bits).astype(np.float16) if level_bits else None,
        outlier_gaps=gaps if outliers else None,
        outlier_values=rng.normal(0, 0.1, outliers).astype(np.float16) if outliers else None,
        rows=rows,
        cols=cols,
        stream_rows=stream_rows,
        window_bits=window_bits,
    )
