"""What the CUDA kernel reads: codes by tiles of rows, tables of int8 and x in digits of int8.

Lanes of a warp lie along columns. Whatever a lane reads at a time is 16 bytes (8 of x where D = 1),
and beside those of its neighbours.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.core import packing
from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.vq_tensor import DenseCodebook, VQTensor

_static = partial(dataclasses.field, metadata={"static": True})
BITS = 4  # of a code
_WORD = 32 // BITS  # codes of a word
_UNIT_WORDS = 2  # words of a row that a thread takes at a time
_UNIT = _WORD * _UNIT_WORDS  # codes
_BASE = 254.0  # x = scale (q0 + q1 / base + q2 / base^2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight of shape (R, C). Rows of a strip fill whole tiles, columns of one whole units."""

    codes: jax.Array  # (tiles, 2 * tile rows / 4, units, 4) uint32: word u, row r are at [u, r / 4]
    tables: jax.Array  # (S, G, D, 4) uint32: the 16 int8 values of each place of a centroid
    scales: jax.Array  # (S, G) float32
    grid: GroupGrid = _static()

    @property
    def tile_rows(self) -> int:
        return tile_rows(self.grid)


def tile_rows(grid: GroupGrid) -> int:
    """Rows that a block of threads takes: 8, or 4 where that leaves fewer rows empty."""
    return 4 if -(-grid.strip_rows // 4) % 2 else 8


def strip_units(grid: GroupGrid) -> int:
    """Units in a row of a strip."""
    return -(-grid.strip_vectors // _UNIT)


def strip_tiles(grid: GroupGrid) -> int:
    return -(-grid.strip_rows // tile_rows(grid))


def pack(tensor: VQTensor) -> PackedWeight:
    """Exact. Codes of the padding are 0: they meet zeros of x, or rows that nobody asks for."""
    grid, book = tensor.grid, tensor.codebook
    rows, units, tiles = tile_rows(grid), strip_units(grid), strip_tiles(grid)
    codes = tensor.unpack_codes()[0]  # (R, J)
    codes = jnp.pad(
        codes,
        (
            (0, grid.padded_rows - grid.rows),
            (0, grid.col_strips * grid.strip_vectors - grid.num_vectors),
        ),
    )
    codes = codes.reshape(grid.row_strips, grid.strip_rows, grid.col_strips, grid.strip_vectors)
    spare = tiles * rows - grid.strip_rows, units * _UNIT - grid.strip_vectors
    codes = jnp.pad(codes, ((0, 0), (0, spare[0]), (0, 0), (0, spare[1])))
    codes = codes.reshape(-1, rows // 4, 4, grid.col_strips * units, _UNIT_WORDS, _WORD)
    shifts = jnp.arange(0, 32, BITS, dtype=jnp.uint32)
    words = jnp.sum(codes.astype(jnp.uint32) << shifts, axis=-1, dtype=jnp.uint32)
    words = words.transpose(0, 4, 1, 3, 2)  # (tiles, u, r / 4, units, r % 4)
    words = words.reshape(words.shape[0], -1, *words.shape[3:])
    return PackedWeight(words, _tables(book), book.scale[0].astype(jnp.float32), grid)


def unpack(packed: PackedWeight) -> VQTensor:
    """The same weight as a VQTensor; int4 centroids become int8."""
    grid, rows = packed.grid, packed.tile_rows
    tiles, units = packed.codes.shape[0], packed.codes.shape[2]
    words = packed.codes.reshape(tiles, _UNIT_WORDS, rows // 4, units, 4).transpose(0, 2, 4, 3, 1)
    shifts = jnp.arange(0, 32, BITS, dtype=jnp.uint32)
    codes = (words[..., None] >> shifts) & (2**BITS - 1)
    codes = codes.reshape(grid.row_strips, -1, grid.col_strips, strip_units(grid) * _UNIT)
    codes = codes[:, : grid.strip_rows, :, : grid.strip_vectors]
    codes = codes.reshape(grid.padded_rows, -1)[: grid.rows, : grid.num_vectors]
    values = lax.bitcast_convert_type(packed.tables, jnp.int8)  # (S, G, D, 4, 4)
    values = values.reshape(*values.shape[:3], -1).swapaxes(2, 3)[None]
    scale = packed.scales.astype(jnp.float16)[None]  # as it was
    book = DenseCodebook(values, scale, 8, 2**BITS, grid.dim)
    return VQTensor(packing.pack(codes, BITS)[None], book, None, BITS, grid)


def _tables(book: DenseCodebook) -> jax.Array:
    unit = dataclasses.replace(book, scale=jnp.ones_like(book.scale))
    values = unit.values()[0].astype(jnp.int8).swapaxes(2, 3)  # (S, G, D, K)
    return lax.bitcast_convert_type(values.reshape(*values.shape[:3], -1, 4), jnp.uint32)


def round_x(x: jax.Array, grid: GroupGrid, digits: int) -> tuple[jax.Array, jax.Array]:
    """x (N, C) in digits of -127 to 127, with a scale for every column strip of the weight.

    A strip with a NaN or an infinity gets NaN for a scale.

    Returns:
      Four digits to a word (N, 2, digits, pieces, units, words of a piece) uint32, and scales
      (N, S) float32.
    """
    batch, dim = x.shape[0], grid.dim
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, grid.padded_cols - x.shape[1])))
    x = x.reshape(batch, grid.col_strips, -1)
    spare = strip_units(grid) * _UNIT * dim - x.shape[2]
    x = jnp.pad(x, ((0, 0), (0, 0), (0, spare)))
    bound = jnp.max(jnp.abs(x), axis=2, keepdims=True)
    finite = jnp.isfinite(bound)
    # Of what is next to nothing the quotient would not be finite.
    inverse = jnp.where(finite & (bound > 1e-36), 127 / bound, 0)
    rest, parts = jnp.where(finite, x, 0) * inverse, []
    for _ in range(digits):
        digit = jnp.round(rest)
        parts.append(digit.astype(jnp.int8))
        rest = (rest - digit) * _BASE
    q = jnp.stack(parts, axis=1)  # (N, digits, S, columns)
    q = q.reshape(batch, digits, -1, _UNIT_WORDS, 2, 4, dim)
    q = q.transpose(0, 3, 1, 6, 4, 2, 5)  # (N, u, digits, D, first or last four, units, 4)
    words = lax.bitcast_convert_type(q, jnp.uint32)
    piece = min(4, 2 * dim)
    words = words.reshape(batch, _UNIT_WORDS, digits, 2 * dim // piece, piece, -1).swapaxes(4, 5)
    return words, jnp.where(finite, bound / 127, jnp.nan)[:, :, 0]
