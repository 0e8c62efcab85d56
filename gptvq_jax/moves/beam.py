"""Beam search over the codes of one vector (AQLM, arXiv 2401.06118, section 3.2), all rows at once.

A lane is a row with all its codes: those of the vectors before this one may differ from lane to
lane. One code after another is replaced by its best alternatives, and of all the lanes that result
the best `width` are kept. Lane 0 is the exception: it is what a search of width 1 would have found,
so a wider search is never worse.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.moves.nearest import lookup, nearest_few

lookup_lanes = jax.vmap(lookup, in_axes=(None, 0))  # (G, K, D) at codes (L, G, r)


class Lanes(NamedTuple):
    """L lanes, best first but for lane 0."""

    codes: jax.Array  # (L, M, G, r)
    origin: jax.Array  # (L, G, r): the lane that was given, of which this one is a continuation
    exists: jax.Array  # (L, G, r) bool: False where there were fewer continuations than lanes


def search(
    target: jax.Array, books: jax.Array, codes: jax.Array, loss: jax.Array, width: int
) -> Lanes:
    """Codes whose centroids sum up to near the target.

    Cost: L x M x K x rows x (3 D + 3 + 5 W) operations, W = min(width, K) alternatives each.

    Args:
      target: (L, G, D, r), whitened.
      books: (M, G, K, D), whitened.
      codes: (M, G, r), those to start from, the same in all lanes.
      loss: (L, G, r) of each lane with these codes; inf if there is no such lane.
      width: lanes to keep.
    """
    lanes = jnp.broadcast_to(codes, (len(target), *codes.shape))
    vectors = [lookup_lanes(book, lanes[:, m]) for m, book in enumerate(books)]  # (L, G, D, r)
    offset = jnp.zeros_like(loss)
    if width > 1:  # the part of the loss that this vector cannot change
        offset = loss - jnp.sum(jnp.square(target - sum(vectors)), axis=2)
    origin = jnp.broadcast_to(jnp.arange(len(target))[:, None, None], loss.shape)
    for m, book in enumerate(books):
        others = sum(vector for n, vector in enumerate(vectors) if n != m)
        found, distance = nearest_few(target - others, book, min(width, books.shape[2]))
        parent, code, loss = _select(found, offset + distance, width)
        offset = jnp.where(jnp.isfinite(loss), follow(offset, parent), jnp.inf)
        origin = follow(origin, parent)
        lanes = follow(lanes, parent, 1).at[:, m].set(code)
        target, *vectors = (follow(x, parent, 2) for x in (target, *vectors))
        vectors[m] = lookup_lanes(book, code)
    return Lanes(lanes, origin, jnp.isfinite(offset))


def follow(values: jax.Array, parent: jax.Array, axis: int | None = None) -> jax.Array:
    """Values of lanes (L, G, r), as those of lanes that continue them.

    Args:
      values: (L, G, r), with one more axis if `axis` says where.
      parent: (L', G, r), the lane that each continues.
      axis: of `values` that is neither L, G nor r.
    """
    if len(values) == len(parent) == 1:  # the greedy search: nothing to choose
        return values
    index = parent if axis is None else jnp.expand_dims(parent, axis)
    return jnp.take_along_axis(values, index, axis=0, mode="promise_in_bounds")


def _select(
    codes: jax.Array, loss: jax.Array, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `width` best of the continuations (W, L, G, r): their lanes, codes, losses (width, G, r).

    Lane 0 of the result is the best continuation of lane 0; the others are the best of the rest.
    """
    if width == 1:
        return jnp.zeros_like(codes[0]), codes[0, :1], loss[0, :1]
    lanes = codes.shape[1]
    codes, loss = (x.reshape(-1, *x.shape[2:]) for x in (codes, loss))
    # As many as are wanted, though there be fewer: what does not exist has infinite loss.
    missing = [(0, max(0, width - len(loss))), (0, 0), (0, 0)]
    others = jnp.pad(loss.at[0].set(jnp.inf), missing, constant_values=jnp.inf)
    others, entries = lax.top_k(-jnp.moveaxis(others, 0, -1), width - 1)
    entries = jnp.concatenate([jnp.zeros_like(loss[:1], jnp.int32), jnp.moveaxis(entries, -1, 0)])
    loss = jnp.concatenate([loss[:1], -jnp.moveaxis(others, -1, 0)])
    entries = jnp.minimum(entries, len(codes) - 1)
    return entries % lanes, follow(codes, entries), loss
