"""Geometry of a packed tensor: which rows share a tile, and where the table of a vector lies.

A TPU register is 8 sublanes x 128 lanes of 32 bits. Vectors of a weight row lie along lanes, rows
of the weight along sublanes. A tile holds the same row of `group_tile` row strips, then the next
row of each, and so on: row t of a tile belongs to strip t % group_tile, so that tables stacked
`group_tile` high lie under any register of codes, and nothing is ever moved to another row.
"""

import dataclasses
import math

import numpy as np

from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.vq_tensor import DenseCodebook, VQTensor

LANES, SUBLANES = 128, 8
LANE_BITS = 7
# VMEM is 16 MiB where it is least. Of that, two buffers of codes take 4 to 6, tables of float32 up
# to 4, the rows of x up to 4 (MAX_X_BYTES); the rest is for stored centroids, results and spills.
_MAX_CODE_BYTES = 2 * 2**20
_MAX_TABLE_BYTES = 4 * 2**20
MAX_X_BYTES = 4 * 2**20
_MAX_TILE_ROWS = 256  # codes of one column block then fill 32 of the 64 registers


@dataclasses.dataclass(frozen=True)
class Layout:
    """Everything static about a packed tensor. Axis letters are explained in grid.py."""

    grid: GroupGrid
    index_bits: int
    num_codebooks: int  # M
    centroid_bits: int  # 16 (float16), 8 or 4 (integers with a scale), 0: products of factors
    factors: int  # numbers of each strip: its scale, or its row of the left factor
    factor_bits: int  # 16 (float16) or 8
    group_tile: int  # row strips of a tile: 1 or a multiple of 8
    row_chunk: int  # rows of each strip in a tile

    @property
    def planes(self) -> tuple[int, ...]:
        """Widths that a code is cut into, most significant bits first."""
        return planes_of(self.index_bits)

    @property
    def size(self) -> int:
        """K: lanes of one table."""
        return 2**self.index_bits

    @property
    def tile_rows(self) -> int:
        return self.group_tile * self.row_chunk

    @property
    def table_rows(self) -> int:
        """Sublanes of a table in VMEM: that of a single strip is repeated in all 8."""
        return max(self.group_tile, SUBLANES)

    @property
    def tiles(self) -> tuple[int, int]:
        """A tiles of row strips, B tiles of the rows of a strip."""
        strips, rows = self.grid.row_strips, self.grid.strip_rows
        return -(-strips // self.group_tile), -(-rows // self.row_chunk)

    @property
    def blocks(self) -> int:
        """Blocks of 128 vectors in a row."""
        return -(-self.grid.num_vectors // LANES)

    @property
    def centroid_planes(self) -> int:
        """Bytes of a centroid; two 4-bit sub-dimensions share one."""
        return -(-self.grid.dim * self.centroid_bits // 8)

    @property
    def centroid_chunks(self) -> int:
        """Chunks of 128 lanes that the K centroids of all column strips fill."""
        return -(-self.grid.col_strips * self.size // LANES)

    @property
    def factor_bytes(self) -> int:
        """Bytes of the numbers of a strip."""
        return self.factors * self.factor_bits // 8

    @property
    def factor_chunks(self) -> int:
        """Chunks of 128 lanes that the bytes of all column strips' numbers fill."""
        return -(-self.grid.col_strips * self.factor_bytes // LANES)

    @property
    def book_chunks(self) -> int:
        """Chunks of one codebook of a row strip."""
        return self.centroid_planes * self.centroid_chunks + self.factor_chunks

    def table_lanes(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Where the table of each vector begins.

        Returns:
          int32 (1, blocks * 128): first lane of the table, counted from the block's first chunk.
          int32 (blocks,): the block's first chunk.
          chunks that the vectors of one block look into, at most.
        """
        vectors = np.minimum(np.arange(self.blocks * LANES), self.grid.num_vectors - 1)
        lanes = (vectors // self.grid.strip_vectors * self.size).reshape(-1, LANES)
        first = lanes[:, 0] // LANES
        lanes = lanes - first[:, None] * LANES
        width = int(lanes.max() + self.size - 1) // LANES + 1
        return lanes.reshape(1, -1).astype(np.int32), first.astype(np.int32), width


def planes_of(bits: int) -> tuple[int, ...]:
    """Widths that divide 32 and add up to `bits`, at most 8."""
    return (8,) if bits == 8 else tuple(width for width in (4, 2, 1) if bits & width)


def make_layout(tensor: VQTensor) -> Layout:
    """Chooses the tiles: the fewest rows of padding, then some 256 rows, then the fewest tables.

    Raises:
      NotImplementedError: the tables of a row strip do not fit in VMEM.
    """
    assert tensor.row_scales is None, "row scales are VQKernel's to apply"
    grid, book = tensor.grid, tensor.codebook
    if isinstance(book, DenseCodebook):
        formats = book.bits, 0 if book.scale is None else 1, 16
    else:
        formats = 0, book.left.shape[-1], 16 if book.left_scale is None else 8
    fixed = (grid, tensor.index_bits, tensor.codes.shape[0], *formats)
    unit = SUBLANES * 32 // min(planes_of(tensor.index_bits))  # rows of one register of words
    candidates = []
    for group_tile in (1, *(SUBLANES * 2**i for i in range(6))):
        step = unit // math.gcd(unit, group_tile)
        last = max(step, _MAX_TILE_ROWS // group_tile)
        candidates += [Layout(*fixed, group_tile, rows) for rows in range(step, last + 1, step)]
    fitting = [layout for layout in candidates if _table_bytes(layout) <= _MAX_TABLE_BYTES]
    if not fitting:
        raise NotImplementedError(
            f"the tables of a row strip take {_table_bytes(candidates[0]) / 2**20:.1f} MiB of "
            f"VMEM in float32 and {_MAX_TABLE_BYTES / 2**20:.0f} are set aside"
        )

    def cost(layout: Layout):
        padded_rows = math.prod(layout.tiles) * layout.tile_rows
        size = abs(layout.tile_rows - _MAX_TILE_ROWS)
        # Tables of 8 strips are made as fast as those of one.
        ties = size, layout.group_tile == 1, -layout.row_chunk
        return max(_code_bytes(layout), _MAX_CODE_BYTES), padded_rows, *ties

    return min(fitting, key=cost)


def _code_bytes(layout: Layout) -> int:
    vectors = layout.num_codebooks * layout.tile_rows * layout.blocks * LANES
    return vectors * layout.index_bits // 8


def _table_bytes(layout: Layout) -> int:
    numbers = layout.num_codebooks * layout.grid.dim * layout.centroid_chunks * LANES
    return 4 * numbers * layout.table_rows
