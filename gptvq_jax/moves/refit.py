"""Codebooks given codes: the loss is a convex quadratic in the centroids.

Q is linear in the centroids, so L(c) = |W - A c|_H^2 and its normal equations are
A^T (A c H) = A^T (W H). Cost per step: one 2 R C^2 matmul, one lookup, one scatter-add; where it
starts the residual is known, and where it ends it falls off.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.row_axis import ALL_HERE, RowAxis
from gptvq_jax.moves.nearest import lookup
from gptvq_jax.moves.residual import Residual, image_of, residual_of

_CONVERGED = 1e-12  # of the squared residual: float32 resolves no less


def decode(
    centroids: jax.Array, codes: jax.Array, scales: jax.Array | None, grid: GroupGrid
) -> jax.Array:
    """The weight that codes stand for: the sum over the M codebooks.

    Args:
      centroids: (M, S, G, K, D).
      codes: (M, S * c / D, G * r) int32.
      scales: (S * c / D, G * r) or None.

    Returns:
      (S * c, G * r), 0 in rows and columns of padding.
    """
    books, strips, groups = centroids.shape[:3]
    positions, rows = grid.strip_vectors, grid.strip_rows
    index = codes.reshape(books, strips, positions, groups, rows)
    index = jnp.swapaxes(index, 2, 3).reshape(books, strips, groups, -1)
    vectors = jnp.sum(lookup(centroids, index), axis=0)  # (S, G, D, J * r)
    vectors = vectors.reshape(strips, groups, grid.dim, positions, rows)
    vectors = jnp.transpose(vectors, (0, 3, 2, 1, 4))  # (S, J, D, G, r)
    if scales is not None:
        vectors = vectors * scales.reshape(strips, positions, 1, groups, rows)
    weight = vectors.reshape(grid.padded_cols, grid.padded_rows)
    inside = (jnp.arange(grid.padded_cols) < grid.cols)[:, None]
    return weight * (inside & grid.row_mask())


def codebook_loss(weight: jax.Array, quantized: jax.Array, hessian: jax.Array) -> jax.Array:
    """L(Q) of the rows here: weight, quantized (S * c, G * r), hessian (S * c, S * c)."""
    return residual_of(weight, quantized, hessian).loss


def refit(
    residual: Residual,
    hessian: jax.Array,
    centroids: jax.Array,
    codes: jax.Array,
    scales: jax.Array | None,
    grid: GroupGrid,
    iterations: int | jax.Array,
) -> tuple[jax.Array, Residual]:
    """Least-squares centroids by conjugate gradients, never worse than those it starts from.

    Args:
      residual: of the centroids given.
      hessian: (S * c, S * c) mean x x^T, zero on the padding.
      centroids: (M, S, G, K, D).
      codes: (M, S * c / D, G * r).
      scales: (S * c / D, G * r) or None.
      iterations: conjugate-gradient steps; each costs 2 R C^2 flops.

    Returns:
      Centroids, and their residual.
    """

    square = None if scales is None else jnp.square(scales)
    return least_squares(
        residual,
        hessian,
        centroids,
        lambda c: decode(c, codes, scales, grid),
        lambda c: decode(c, codes, square, grid),
        iterations,
        axis=grid.axis,
        shared=grid.shared,
    )


def least_squares(
    residual: Residual,
    hessian: jax.Array,
    params: jax.Array,
    forward: Callable[[jax.Array], jax.Array],
    squared: Callable[[jax.Array], jax.Array],
    iterations: int | jax.Array,
    *,
    axis: RowAxis = ALL_HERE,
    shared: bool = False,
) -> tuple[jax.Array, Residual]:
    """`refit` of any parameters that the weight is linear in.

    Args:
      residual, hessian, iterations: as there.
      params: an array.
      forward: A, params -> what of the weight they are (S * c, G * r).
      squared: `forward` with the square of every coefficient.
      axis: where more rows are; all take steps of one length.
      shared: whether those rows have the same params, not some of their own.
    """

    def transposed(function):
        of_rows = jax.linear_transpose(function, params)
        return lambda x: axis.sum(of_rows(x)[0]) if shared else of_rows(x)[0]

    def dot(x, y):
        product = jnp.vdot(x, y, precision="highest")
        return product if shared else axis.sum(product)

    adjoint = transposed(forward)

    # Jacobi preconditioner: the diagonal of A^T H A with the cross terms of a parameter left out.
    ones = jnp.broadcast_to(jnp.diagonal(hessian)[:, None], residual.error.shape)
    diagonal = transposed(squared)(ones)
    precondition = 1 / jnp.where(diagonal > 0, diagonal, 1.0)

    slope = adjoint(residual.image)  # of the normal equations: A^T H (W - A c)

    def step(_, state):
        solution, left, slope, direction, energy = state
        change = forward(direction)
        image = image_of(hessian, change)
        bend = adjoint(image)
        curvature = dot(direction, bend)
        # A converged (or null) direction has nothing left to gain: stand still. Codebooks that may
        # trade a constant leave directions without curvature, along which rounding would go on.
        moves = (curvature > 0) & (energy > _CONVERGED * first_energy)
        length = jnp.where(moves, energy / jnp.where(curvature > 0, curvature, 1.0), 0.0)
        solution = solution + length * direction
        left = Residual(left.error - length * change, left.image - length * image)
        slope = slope - length * bend
        scaled = precondition * slope
        new_energy = dot(slope, scaled)
        ratio = jnp.where(energy > 0, new_energy / jnp.where(energy > 0, energy, 1.0), 0.0)
        return solution, left, slope, scaled + ratio * direction, new_energy

    start = precondition * slope
    first_energy = dot(slope, start)
    state = (params, residual, slope, start, first_energy)
    solution, left, *_ = lax.fori_loop(0, iterations, step, state)
    better = axis.sum(left.loss) < axis.sum(residual.loss)
    return jax.tree.map(
        lambda new, old: jnp.where(better, new, old), (solution, left), (params, residual)
    )


def root_mean_square(values: jax.Array, axis: RowAxis = ALL_HERE) -> jax.Array:
    """Of all entries, (); 1 where all are 0. What a step of Adam is measured in.

    `axis` is where more of them are, as many on each device.
    """
    square = axis.sum(jnp.mean(jnp.square(values))) / axis.sum(1)
    size = jnp.sqrt(square)
    return jnp.where(size > 0, size, 1.0)


def gradient_update(
    weight: jax.Array,
    hessian: jax.Array,
    params,
    reconstruct,
    *,
    optimizer: optax.GradientTransformation,
    iterations: int | jax.Array,
    axis: RowAxis = ALL_HERE,
    shared=False,
):
    """The papers' codebook update: Adam on L (GPTVQ, section 3.3; AQLM, section 3.3).

    The best step is kept.

    Args:
      weight, hessian: as in `refit`.
      params: pytree of what is tuned (centroids, or the factors of compressed codebooks).
      reconstruct: params -> quantized (S * c, G * r).
      optimizer: of leaves divided by their root mean square: one learning rate fits every layer.
      iterations: steps.
      axis: where more rows are.
      shared: pytree like params of bools, whether rows on other devices have the same leaf.

    Returns:
      The params with the lowest loss seen, those given included.
    """
    shared = jax.tree.broadcast(shared, params)
    axes = [ALL_HERE if of_all else axis for of_all in jax.tree.leaves(shared)]
    leaves, tree = jax.tree.flatten(params)
    size = tree.unflatten(map(root_mean_square, leaves, axes))
    # Adam adds an absolute number to the size of a gradient: the loss is in units of its own.
    signal = axis.sum(codebook_loss(weight, jnp.zeros_like(weight), hessian))
    count = sum(leaf.size * own.sum(1) for leaf, own in zip(leaves, axes, strict=True))
    loss_unit = jnp.where(signal > 0, signal, 1.0) / count
    loss_and_grad = jax.value_and_grad(
        lambda unit: (
            codebook_loss(weight, reconstruct(jax.tree.map(jnp.multiply, unit, size)), hessian)
            / loss_unit
        )
    )

    def step(_, state):
        unit, opt_state, best, lowest = state
        loss, grad = loss_and_grad(unit)
        loss = axis.sum(loss)
        grad = jax.tree.map(lambda of_all, g: axis.sum(g) if of_all else g, shared, grad)
        best, lowest = lax.cond(loss < lowest, lambda: (unit, loss), lambda: (best, lowest))
        updates, opt_state = optimizer.update(grad, opt_state, unit)
        return optax.apply_updates(unit, updates), opt_state, best, lowest

    unit = jax.tree.map(jnp.divide, params, size)
    state = (unit, optimizer.init(unit), unit, jnp.float32(jnp.inf))
    _, _, best, _ = lax.fori_loop(0, iterations + 1, step, state)
    return jax.tree.map(jnp.multiply, best, size)
