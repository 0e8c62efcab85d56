"""New values for the centroids that no vector uses, of a codebook that all of a layer shares."""

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.moves.nearest import lookup
from gptvq_jax.moves.residual import Residual


def reseed(
    residual: Residual,
    hessian: jax.Array,
    centroids: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    grid: GroupGrid,
) -> jax.Array:
    """Puts unused centroids where they would lower the loss most, each for one vector.

    With G = E H, the best change of the vector at columns P is G_P H_PP^-1 and gains
    G_P H_PP^-1 G_P^T (recode.py). The loss stays what it is, for no code points to them yet: a
    recode may now choose them.

    Args:
      residual: of these centroids and codes, arrays (c, r).
      hessian: (c, c) mean x x^T, zero on the padding.
      centroids: (M, 1, 1, K, D).
      codes: (M, c / D, r).
      scales: (c / D, r), not 0.
      grid: of one group.

    Returns:
      Centroids, those in use unchanged.
    """
    books, *_, size, dim = centroids.shape
    vectors = grid.strip_vectors
    gradient = residual.image.reshape(vectors, dim, -1)
    blocks = jnp.diagonal(hessian.reshape(vectors, dim, vectors, dim), axis1=0, axis2=2)
    blocks = jnp.moveaxis(blocks, -1, 0)  # (c / D, D, D)
    trace = jnp.trace(blocks, axis1=1, axis2=2)[:, None, None]
    inverse = jnp.linalg.inv(blocks + (1e-6 * trace + (trace == 0)) * jnp.eye(dim))
    move = jnp.einsum("jdr,jde->jer", gradient, inverse, precision="highest")
    gain = jnp.sum(move * gradient, axis=1)  # (c / D, r)
    gain, worst = lax.top_k(gain.reshape(-1), min(size, gain.size))
    missing = (move / scales[:, None]).swapaxes(0, 1).reshape(dim, -1)[:, worst]  # (D, n)
    own = codes.reshape(books, -1)
    counted = jnp.broadcast_to(grid.row_mask(), codes.shape[1:]).reshape(-1).astype(jnp.float32)
    # Of the worst here, the worst of all devices.
    axis, found = grid.axis, (missing, own[:, worst])
    gain = axis.gather(gain, 0)
    _, worst = lax.top_k(gain, min(size, len(gain)))
    missing, old = (axis.gather(x, 1)[:, worst] for x in found)

    def of_book(m):
        unused = axis.sum(jnp.zeros(size).at[own[m]].add(counted)) == 0
        # Codebooks take turns, lest all go for the same vectors.
        place = ((jnp.cumsum(unused) - 1) * books + m) % len(worst)
        better = lookup(centroids[m, 0, 0], old[m]) + missing
        return jnp.where(unused[:, None], better[:, place].T, centroids[m, 0, 0])

    return jnp.stack([of_book(m) for m in range(books)])[:, None, None]
