"""What the kernels for a block of columns have in common: a sweep or a recode of some rows.

A program takes some rows through all vectors of the block: nearest centroid, its error, and what
that changes in the columns of the block to the right. How rows and columns lie in memory is the
kernel's own (`tpu/columns.py`, `gpu/columns.py`). In XLA's programs every vector is some 14 to 50
kernels; here the block is one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_UNROLL = 8  # comparisons per step of a search: what is to be loaded comes early

Vector = Sequence[jax.Array]  # D numbers of every row of a tile


class Block(NamedTuple):
    """The block of columns that a kernel is given: whole arrays, and where it starts in them."""

    cols: int  # B
    start: jax.Array  # () int32: its first column
    values: jax.Array  # (C, G * r): W of a sweep, H E of a recode
    matrix: jax.Array  # (C, C): U or H
    tables: Sequence[jax.Array]  # (C / D, D, D) each, as `sweep_block` and `recode_block` say
    books: jax.Array  # (S, G, K, D) centroids of all column strips, or (1, ...) of this one
    scale: jax.Array | None  # (C / D or c / D, G * r) likewise, of each vector; None: all are 1
    strip_cols: int  # c

    @property
    def sizes(self) -> "Sizes":
        strips, groups, size, dim = self.books.shape
        scales = 0 if self.scale is None else len(self.scale)
        vectors = self.cols // dim, self.strip_cols // dim
        return Sizes(*vectors, dim, size, groups, strips, scales, *self.values.shape)


class Sizes(NamedTuple):
    """Static sizes of a block, and where in its arrays a vector is."""

    vectors: int  # B / D
    strip_vectors: int  # c / D
    dim: int
    size: int  # K
    groups: int  # G
    strips: int  # of `books`
    scales: int  # rows of `scale`; 0: there is none
    all_cols: int  # C
    rows: int  # G * r

    def strip(self, vector: jax.Array) -> jax.Array:
        """The part of `books` that a vector of the layer has its centroids from."""
        return lax.rem(lax.div(vector, jnp.int32(self.strip_vectors)), jnp.int32(self.strips))

    def scale_row(self, vector: jax.Array) -> jax.Array:
        return lax.rem(vector, jnp.int32(self.scales))


class Tile(NamedTuple):
    """How a kernel reads and writes its rows; j counts vectors of the block."""

    columns: Callable[[Any, jax.Array], Vector]  # local columns of vector j
    feed: Callable[[Any, jax.Array, Vector], Any]  # local columns after change of vector j
    scale: Callable[[jax.Array], jax.Array] | None  # of vector j; None: all are 1
    table: Callable[[int, jax.Array], list[Vector]]  # D x D numbers: row of columns, table n of j
    centroid: Callable[[jax.Array], Vector]  # centroid k
    write: Callable[[int, jax.Array, Vector], None]  # result n of vector j


def sweep_block(
    tile: Tile, local: Any, sizes: Sizes, loss: jax.Array, inside: jax.Array
) -> jax.Array:
    """Codes and errors: results 0 and 1. Tables: metric and feedback.

    Args:
      tile: of the kernel.
      local: columns of the block, in whatever form the tile takes them.
      sizes: of the block.
      loss: of every row so far.
      inside: bool, rows that are none of padding, which has no error.

    Returns:
      The loss with that of the block, sum |E|^2.
    """

    def step(j, state):
        local, loss = state
        x = tile.columns(local, j)
        unit = x if tile.scale is None else [v / tile.scale(j) for v in x]
        code, q = _nearest(unit, tile.table(0, j), tile.centroid, sizes.size)
        if tile.scale is not None:
            q = [v * tile.scale(j) for v in q]
        error = _times([a - b for a, b in zip(x, q, strict=True)], tile.table(1, j))
        error = [jnp.where(inside, v, 0.0) for v in error]
        tile.write(0, j, [code])
        tile.write(1, j, error)
        return tile.feed(local, j, error), loss + sum(map(jnp.square, error))

    return lax.fori_loop(0, sizes.vectors, step, (local, loss))[1]


def recode_block(
    tile: Tile,
    local: Any,
    sizes: Sizes,
    old: Callable[[jax.Array], tuple[jax.Array, Vector]],
) -> None:
    """New codes, and what they change of the weight: results 0 and 1.

    Args:
      tile: of the kernel, with tables H_PP^-1, L and H_PP = L L^T of each vector, ridged but for
        the last.
      local: columns of H E.
      sizes: of the block.
      old: the code and the centroid that vector j has.
    """

    def step(j, local):
        g = tile.columns(local, j)
        old_code, old_vector = old(j)
        move = _times(g, tile.table(0, j))
        if tile.scale is not None:
            move = [v / tile.scale(j) for v in move]
        target = [a + b for a, b in zip(old_vector, move, strict=True)]
        code, new = _nearest(target, tile.table(1, j), tile.centroid, sizes.size)
        delta = [a - b for a, b in zip(new, old_vector, strict=True)]
        if tile.scale is not None:
            delta = [v * tile.scale(j) for v in delta]
        bend = _times(delta, tile.table(2, j))
        more = sum(d * (b - 2 * v) for d, b, v in zip(delta, bend, g, strict=True))
        delta = [jnp.where(more < 0, v, 0.0) for v in delta]
        tile.write(0, j, [jnp.where(more < 0, code, old_code)])
        tile.write(1, j, delta)
        return tile.feed(local, j, delta)

    lax.fori_loop(0, sizes.vectors, step, local)


def _nearest(
    point: Vector, metric: list[Vector], centroid: Callable[[jax.Array], Vector], size: int
) -> tuple[jax.Array, Vector]:
    """Code and centroid at the least |(point - c) M|^2; the lowest index wins a tie."""
    unroll = next(n for n in range(min(_UNROLL, size), 0, -1) if size % n == 0)

    def compare(step, found):
        least, code, vector = found
        candidates = [centroid(step * unroll + i) for i in range(unroll)]
        for i, candidate in enumerate(candidates):
            away = _times([a - b for a, b in zip(point, candidate, strict=True)], metric)
            distance = sum(jnp.square(v) for v in away)
            closer = distance < least
            least = jnp.where(closer, distance, least)
            code = jnp.where(closer, step * unroll + i, code)
            vector = [jnp.where(closer, a, b) for a, b in zip(candidate, vector, strict=True)]
        return least, code, vector

    # Where nothing is nearer than infinity it is centroid 0, as in moves.nearest.
    shape = point[0].shape
    first = [jnp.broadcast_to(v, shape) for v in centroid(jnp.int32(0))]
    start = jnp.full(shape, jnp.inf), jnp.zeros(shape, jnp.int32), first
    _, code, vector = lax.fori_loop(0, size // unroll, compare, start)
    return code, vector


def _times(vector: Vector, matrix: list[Vector]) -> Vector:
    """vector @ matrix, of every row."""
    return [
        sum(v * row[e] for v, row in zip(vector, matrix, strict=True)) for e in range(len(matrix))
    ]
