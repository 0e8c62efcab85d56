"""Centroids: stored as bytes, made tables of 32-bit lanes in VMEM once for each row strip.

Stored, the centroids of all column strips of a row strip lie side by side, lane strip * K + code,
in chunks of 128 lanes, one byte plane after the other; the bytes of each strip's numbers (its
scale, or its row of the left factor) follow. A table has the same lanes, and in each a float32, or
two bfloat16 sub-dimensions. A TPU has no float16: its bits are taken apart as integers.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from gptvq_jax.core import packing
from gptvq_jax.core.vq_tensor import DenseCodebook, FactoredCodebook
from gptvq_jax.ops.tpu.codes import pad_axis
from gptvq_jax.ops.tpu.layout import LANE_BITS, LANES, SUBLANES, Layout

_TOGETHER = SUBLANES  # rows whose lookups in all chunks come one after the other: a register


def pack_tables(book: DenseCodebook | FactoredCodebook, layout: Layout) -> jax.Array:
    """int8 (A, M * book_chunks, group_tile, 128)."""
    chunks = []
    if isinstance(book, DenseCodebook):
        numbers = None if book.scale is None else book.scale[..., None]
        chunks.append(_chunks(_centroid_planes(book, layout)))
    else:
        numbers = book.left
    if numbers is not None:
        chunks.append(_chunks(_bytes(numbers)[..., None, :]))
    tables = jnp.concatenate(chunks, axis=2)  # (M, G, book_chunks, 128)
    tiles = layout.tiles[0]
    tables = pad_axis(tables, 1, tiles * layout.group_tile)
    tables = tables.reshape(layout.num_codebooks, tiles, layout.group_tile, -1, LANES)
    return tables.transpose(1, 0, 3, 2, 4).reshape(tiles, -1, layout.group_tile, LANES)


def pack_right(book: DenseCodebook | FactoredCodebook, layout: Layout) -> jax.Array:
    """The right factor times the scale of the left one, float32 (rank, max(K, 128)).

    Repeated to fill 128 lanes. Of dense codebooks: one zero row, which is never read.
    """
    if isinstance(book, DenseCodebook):
        return jnp.zeros((1, LANES), jnp.float32)
    right = jnp.asarray(book.right, jnp.float32)
    if book.left_scale is not None:
        right = right * book.left_scale.astype(jnp.float32)[:, None]
    return jnp.tile(pad_axis(right, 1, layout.size), (1, max(1, LANES // layout.size)))


def lookup(chunk, index: jax.Array, width: int) -> jax.Array:
    """chunk(index // 128)[row, index % 128] of each row, for indices below width * 128.

    A lookup has 128 lanes to choose from, so that wider tables take several and selects. Those by
    the same lanes come together: to say which lanes costs as much as to look up.
    """
    if width == 1:
        return _take(chunk(0), index)
    tables = [chunk(i) for i in range(width)]
    registers = []
    for first in range(0, len(index), _TOGETHER):
        rows = slice(first, first + _TOGETHER)
        lane, number = index[rows] & (LANES - 1), index[rows] >> LANE_BITS
        found = _take(tables[0][rows], lane)
        for i in range(1, width):
            found = jnp.where(number == i, _take(tables[i][rows], lane), found)
        registers.append(found)
    return jnp.concatenate(registers)


def _take(lanes: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(lanes, index, axis=1, mode="promise_in_bounds")


def grouped_loop(count: int, group: int, body) -> None:
    """body(first, size) over `count` steps, `group` at a time: what overlaps hides latencies."""
    groups, rest = divmod(count, group)
    if groups > 1:
        jax.lax.fori_loop(0, groups, lambda i, _: body(i * group, group), None)
    elif groups:
        body(0, group)
    if rest:
        body(count - rest, rest)


def expand_tables(bytes_ref, right_ref, numbers_ref, table_ref, layout: Layout) -> None:
    """Writes the tables of a tile of row strips.

    Args:
      bytes_ref: int8 (1, M * book_chunks, group_tile, 128), of `pack_tables`.
      right_ref: float32, of `pack_right`.
      numbers_ref: float32 (numbers, chunks of column strips, table_rows, 128), scratch.
      table_ref: (M * parts, centroid_chunks, table_rows, 128), the result: float32, a part for each
        of D, or int32, a part for two of them as bfloat16, the first in the low half.
    """
    dim, parts = layout.grid.dim, table_ref.shape[0] // layout.num_codebooks
    strip_chunks = numbers_ref.shape[1]
    lane = jax.lax.broadcasted_iota(jnp.int32, (layout.table_rows, LANES), 1)

    def strip_of(lanes):
        return jnp.minimum(lanes, layout.grid.col_strips - 1)

    for book in range(layout.num_codebooks):

        def byte(chunk, start=book * layout.book_chunks):
            stored = bytes_ref[0, start + chunk].astype(jnp.int32)
            return jnp.broadcast_to(stored, (layout.table_rows, LANES))

        for chunk in range(strip_chunks if layout.factors else 0):
            _expand_numbers(byte, numbers_ref, strip_of(chunk * LANES + lane), chunk, layout)

        def chunks_step(first, size, byte=byte, book=book):
            for chunk in (first + i for i in range(size)):
                strip = strip_of((chunk * LANES + lane) >> layout.index_bits)
                numbers = [
                    lookup(lambda i, n=n: numbers_ref[n, i], strip, strip_chunks)
                    for n in range(layout.factors)
                ]
                read = partial(_centroid, byte, numbers, right_ref, chunk, layout=layout)
                values = [read(d) for d in range(dim)]
                if table_ref.dtype == jnp.int32:
                    values += [jnp.zeros_like(values[0])] * (dim % 2)
                    values = [_bfloat16_pair(*values[d : d + 2]) for d in range(0, dim, 2)]
                for part, value in enumerate(values):
                    table_ref[book * parts + part, chunk] = value

        grouped_loop(layout.centroid_chunks, 2, chunks_step)


def _expand_numbers(byte, numbers_ref, strip, chunk: int, layout: Layout) -> None:
    """float32 numbers of 128 column strips from their bytes."""
    start = layout.centroid_planes * layout.centroid_chunks

    def read(i):
        index = strip * layout.factor_bytes + i
        return lookup(lambda c: byte(start + c), index, layout.factor_chunks)

    for n in range(layout.factors):
        wide = layout.factor_bits == 16
        number = _float16(read(2 * n), read(2 * n + 1)) if wide else read(n).astype(jnp.float32)
        numbers_ref[n, chunk] = number


def _centroid(byte, numbers, right_ref, chunk, d: int, *, layout: Layout) -> jax.Array:
    """Sub-dimension d of the centroids of a chunk, float32 (table_rows, 128)."""
    chunks, planes = layout.centroid_chunks, layout.centroid_planes
    if layout.centroid_bits == 16:
        return _float16(byte(2 * d * chunks + chunk), byte((2 * d + 1) * chunks + chunk))
    if layout.centroid_bits == 8:
        return byte(d * chunks + chunk).astype(jnp.float32) * numbers[0]
    if layout.centroid_bits == 4:
        nibble = (byte(d % planes * chunks + chunk) >> d // planes * 4) & 15
        return (nibble - 8).astype(jnp.float32) * numbers[0]
    start = chunk % (right_ref.shape[1] // LANES) * LANES
    lanes = pl.ds(pl.multiple_of(start, LANES), LANES)
    return sum(number * right_ref[n : n + 1, lanes] for n, number in enumerate(numbers))


def _float16(low: jax.Array, high: jax.Array) -> jax.Array:
    """float32 values of float16 numbers, given as two sign-extended bytes."""
    magnitude = (low & 255) | (high & 127) << 8
    # A product moves the exponent's bias; numbers that it would flush to 0 are integers x 2^-24.
    normal = jax.lax.bitcast_convert_type(magnitude << 13, jnp.float32) * 2.0**112
    value = jnp.where(magnitude < 1024, magnitude.astype(jnp.float32) * 2.0**-24, normal)
    return jnp.where(high < 0, -value, value)


def _bfloat16_pair(low: jax.Array, high: jax.Array) -> jax.Array:
    """Two float32 arrays, rounded to bfloat16, in the halves of int32."""
    low, high = (jax.lax.bitcast_convert_type(v, jnp.int32) + (1 << 15) for v in (low, high))
    return jax.lax.shift_right_logical(low, 16) | (high & -(1 << 16))


def _centroid_planes(book: DenseCodebook, layout: Layout) -> jax.Array:
    """int8 (M, S, G, centroid_planes, K)."""
    centroids = jnp.asarray(book.centroids)
    if book.bits == 4:
        centroids = packing.unpack(centroids, 4, book.codebook_size * book.dim)
        centroids = centroids.reshape(*book.scale.shape, book.codebook_size, book.dim)
        low = layout.centroid_planes  # sub-dimensions in the low nibbles, the others above them
        centroids = pad_axis(centroids, 4, 2 * low).astype(jnp.uint8)
        centroids = centroids[..., :low] | centroids[..., low:] << 4
    return jnp.swapaxes(_bytes(pad_axis(centroids, 3, layout.size)), 3, 4)


def _bytes(array: jax.Array) -> jax.Array:
    """The last axis as int8; low and high bytes of float16 in turn."""
    array = jnp.asarray(array)
    if array.dtype == jnp.float16:
        array = jax.lax.bitcast_convert_type(array, jnp.uint8)  # (..., n, 2), low byte first
        array = array.reshape(*array.shape[:-2], -1)
    return jax.lax.bitcast_convert_type(array, jnp.int8)


def _chunks(planes: jax.Array) -> jax.Array:
    """(M, S, G, planes, n) -> (M, G, chunks, 128): the strips of a plane side by side."""
    books, _, groups, count, _ = planes.shape
    lanes = planes.transpose(0, 2, 3, 1, 4).reshape(books, groups, count, -1)
    lanes = pad_axis(lanes, 3, -(-lanes.shape[-1] // LANES) * LANES)
    return lanes.reshape(books, groups, -1, LANES)
