"""Codes as 32-bit words: shift and mask give a register of codes, and no lane is moved.

A code of b bits is cut into planes of 8, 4, 2 or 1 bits (3 = 2 + 1). In a plane of w bits, field p
of word row s is the code of tile row p * (word rows) + s in the same lane. Rows are exactly b / 8
bytes per vector; only 128 lanes and the rows of a tile are filled up.
"""

import jax
import jax.numpy as jnp

from gptvq_jax.ops.tpu.layout import LANES, Layout


def pack_codes(codes: jax.Array, layout: Layout) -> jax.Array:
    """Codes (M, R, J) of any integer type -> words int32 (A, B, M, tile_rows * b / 32, lanes)."""
    books = codes.shape[0]
    codes = pad_axis(codes.astype(jnp.uint8), 2, layout.blocks * LANES)
    codes = _tile_rows(jnp.swapaxes(codes, 0, 1), layout)  # (A, B, tile_rows, M, lanes)
    codes = jnp.swapaxes(codes, 2, 3)
    words, offset = [], layout.index_bits
    for width in layout.planes:
        offset -= width
        fields = (codes >> offset) & (2**width - 1)
        fields = fields.reshape(*layout.tiles, books, 32 // width, -1, fields.shape[-1])
        shifted = (fields[:, :, :, p].astype(jnp.uint32) << p * width for p in range(32 // width))
        words.append(sum(shifted))
    return jax.lax.bitcast_convert_type(jnp.concatenate(words, axis=3), jnp.int32)


def read_codes(words: jax.Array, layout: Layout) -> jax.Array:
    """Words of one block of lanes, int32 (tile_rows * b / 32, 128) -> codes (tile_rows, 128)."""
    codes, row, offset = 0, 0, layout.index_bits
    for width in layout.planes:
        offset -= width
        rows = layout.tile_rows * width // 32
        plane = words[row : row + rows]
        row += rows
        mask = (2**width - 1) << offset
        fields = []
        for shift in (start - offset for start in range(0, 32, width)):
            # One shift brings the field to its place in the code.
            moved = plane << -shift if shift < 0 else jax.lax.shift_right_logical(plane, shift)
            fields.append(moved & mask)
        codes |= jnp.concatenate(fields, axis=0)
    return codes


def restore_rows(tiled: jax.Array, layout: Layout) -> jax.Array:
    """Outputs by tile (A, B, N, tile_rows) -> (N, R)."""
    grid, batch = layout.grid, tiled.shape[2]
    tiled = tiled.reshape(*layout.tiles, batch, layout.row_chunk, layout.group_tile)
    strips = layout.tiles[0] * layout.group_tile
    rows = tiled.transpose(2, 0, 4, 1, 3)
    rows = rows.reshape(batch, strips, layout.tiles[1] * layout.row_chunk)
    rows = rows[:, : grid.row_strips, : grid.strip_rows]
    return rows.reshape(batch, grid.padded_rows)[:, : grid.rows]


def pad_axis(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Zeros after the last element of an axis."""
    pad = [(0, 0)] * array.ndim
    pad[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, pad)


def _tile_rows(array: jax.Array, layout: Layout) -> jax.Array:
    """(R, ...) -> (A, B, tile_rows, ...), zeros in rows that are not there."""
    grid, rest = layout.grid, array.shape[1:]
    array = pad_axis(array, 0, grid.padded_rows).reshape(grid.row_strips, grid.strip_rows, *rest)
    tiles, chunks = layout.tiles
    array = pad_axis(array, 0, tiles * layout.group_tile)
    array = pad_axis(array, 1, chunks * layout.row_chunk)
    array = array.reshape(tiles, layout.group_tile, chunks, layout.row_chunk, *rest)
    array = jnp.moveaxis(array, (0, 2, 3, 1), (0, 1, 2, 3))
    return array.reshape(tiles, chunks, layout.tile_rows, *rest)
