"""The calibration second moment H = mean_t x_t x_t^T and its factors.

The papers write H = 2 X X^T; the factor 2 changes no minimiser and is dropped here. Tokens may be
weighted by how much the model's loss depends on them (GuidedQuant, arXiv 2505.07004).

The unit of H, that of the inputs squared, changes no minimiser either. What is added to H here is a
fraction of it, and the methods work on H / `unit(H)`: for c a power of two, c H gives the very same
codes as H, and inputs of any size neither overflow nor vanish in float32.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from gptvq_jax.core.products import BFLOAT16X3, FLOAT32, matmul


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["total", "count"],
    meta_fields=["products"],
)
@dataclasses.dataclass(frozen=True)
class Moment:
    """Running sum of w x x^T over calibration tokens of weight w."""

    total: jax.Array  # (C, C) float32; of `add_inputs` only the upper triangle counts
    count: jax.Array  # () float32, sum of w: the tokens so far where none is weighted
    products: str = FLOAT32  # how x x^T is multiplied, of core.products; always summed in float32


def init_moment(rows: int, cols: int | None = None, products: str = FLOAT32) -> Moment:
    """Zeros (rows, cols), square by default."""
    shape = (rows, rows if cols is None else cols)
    return Moment(jnp.zeros(shape, jnp.float32), jnp.zeros((), jnp.float32), products)


_TILES = 4  # across: the products above and on the diagonal are 5/8 of all


def add_inputs(moment: Moment, inputs: jax.Array, weights: jax.Array | None = None) -> Moment:
    """Adds the inputs of one batch, shape (..., C), with weights (...) or 1.

    A second moment is symmetric: tiles below the diagonal are not computed. Weights are at least 0.
    """
    x = inputs.reshape(-1, inputs.shape[-1]).astype(jnp.float32)
    x, y, count = _weighted(x, x, weights, moment.products)
    cols = x.shape[1]
    size = tile_size(cols)
    total = moment.total
    for start in range(0, cols, size):
        tile = matmul(y[:, start : start + size].T, x[:, start:], moment.products)
        total = total.at[start : start + size, start:].add(tile)
    return Moment(total, moment.count + count, moment.products)


def tile_size(cols: int) -> int:
    """Rows and columns of a tile of a moment (C, C)."""
    return -(-cols // _TILES)


def add_products(
    moment: Moment, left: jax.Array, right: jax.Array, weights: jax.Array | None = None
) -> Moment:
    """Adds w x y^T over the tokens of one batch; left and right are (..., C), weights (...)."""
    x = left.reshape(-1, left.shape[-1]).astype(jnp.float32)
    y = right.reshape(-1, right.shape[-1]).astype(jnp.float32)
    x, y, count = _weighted(x, y, weights, moment.products)
    total = moment.total + matmul(x.T, y, moment.products)
    return Moment(total, moment.count + count, moment.products)


def _weighted(
    x: jax.Array, y: jax.Array, weights: jax.Array | None, products: str
) -> tuple[jax.Array, jax.Array, jax.Array | int]:
    """x and y (tokens, C), whose products with each other have weights in them; the sum of these.

    Where both will be rounded, each has the root of its weight: x x^T is then that of some inputs,
    which are rounded, and stays positive semidefinite.
    """
    if weights is None:
        return x, y, len(x)
    of_token = weights.reshape(-1, 1)
    if products == FLOAT32:
        return x, y * of_token, jnp.sum(weights)
    root = jnp.sqrt(of_token)
    return x * root, y * root, jnp.sum(weights)


def mean(moment: Moment) -> jax.Array:
    """H = sum w x x^T / sum w (C, C), of a moment of `add_inputs`."""
    upper = jnp.triu(mean_product(moment))
    return upper + jnp.triu(upper, 1).T


def mean_product(moment: Moment) -> jax.Array:
    """sum w x y^T / sum w (C, C)."""
    return moment.total / jnp.where(moment.count > 0, moment.count, 1.0)


def power_of_two(size: jax.Array) -> jax.Array:
    """The largest power of two that is at most `size`, float32; 1 where size is 0.

    To divide by it rounds nothing.
    """
    exponent = jnp.where(size > 0, jnp.frexp(size)[1] - 1, 0)
    return jnp.ldexp(jnp.ones_like(size), exponent)


def unit(hessian: jax.Array) -> jax.Array:
    """The power of two just below the largest entry of the diagonal of H (C, C); 1 if all are 0."""
    return power_of_two(jnp.max(jnp.diagonal(hessian)))


@partial(jax.jit, static_argnames="products")
def asymmetric_target(
    weight: jax.Array,
    hessian: jax.Array,
    shift: jax.Array,
    hinv_chol: jax.Array,
    strength: float | jax.Array,
    products: str = FLOAT32,
) -> jax.Array:
    """W* = W + strength * S H^-1, what to quantize when the inputs are quantized upstream.

    A layer gets inputs y where the float model has x, and outputs z = W x. |z - Q y|^2, averaged
    over tokens, is (W* - Q) H (W* - Q)^T plus a constant, with H = mean y y^T, S = mean (z - W y)
    y^T and strength 1: completing the square gives W* H = mean z y^T.

    Args:
      weight: W (R, C).
      hessian: H (C, C).
      shift: S (R, C): W (C - H) with C = mean x y^T, or mean z y^T - W H.
      hinv_chol: U of `factorize(H)`; its damping pulls W* towards W where H is weak.
      strength: 0 (ignore the difference) to 1.
      products: SOLVE_PRODUCTS. In three bfloat16 products W* - W loses a hundred-thousandth of the
        terms that it is a sum of; the damping keeps these small.
    """
    solved = matmul(shift / unit(hessian), hinv_chol.T, products)
    return weight + strength * matmul(solved, hinv_chol, products)


SOLVE_PRODUCTS = (FLOAT32, BFLOAT16X3)  # plain bfloat16 is too coarse for products with H^-1


def damp(hessian: jax.Array, damping: float | jax.Array) -> jax.Array:
    """H + damping * m * I, with m the mean of diag H over the live columns.

    A dead column is an input that calibration never excited; GPTQ (arXiv 2210.17323, code) sets its
    weights to 0, `zero_dead` here. GPTQ also puts an absolute 1 on its diagonal, which counts in
    its mean: then dead inputs change how the others are quantized, in a way that depends on the
    unit of H. Here the others are damped as if the dead ones were not there. A dead column has the
    damping alone on its diagonal, so that centroids spend little on its zeros; without damping it
    has m, for H must be definite.

    Args:
      hessian: (C, C) mean x x^T.
      damping: fraction of m.
    """
    diag = jnp.diagonal(hessian)
    live = diag > 0
    count = jnp.sum(live)
    mean = jnp.where(count > 0, jnp.sum(jnp.where(live, diag, 0.0)) / jnp.maximum(count, 1), 1.0)
    of_dead = jnp.where(damping > 0, damping, 1.0)
    return hessian + jnp.diag(mean * jnp.where(live, damping, of_dead))


def zero_dead(weight: jax.Array, hessian: jax.Array) -> jax.Array:
    """Weight (R, C) with 0 in the columns that calibration never excited."""
    return jnp.where(jnp.diagonal(hessian) <= 0, 0.0, weight)


def inverse_cholesky(hessian: jax.Array) -> jax.Array:
    """U, upper triangular with U^T U = H^-1; NaN where H is not positive definite.

    With J the reversal of the axes, J H J = L L^T gives H = (J L J)(J L J)^T, and J L J is upper
    triangular: it is U^-1. One factorisation and one triangular solve, H^-1 is never formed.

    Args:
      hessian: (C, C) symmetric positive definite.
    """
    lower = jnp.linalg.cholesky(hessian[::-1, ::-1])
    return jax.scipy.linalg.solve_triangular(
        lower[::-1, ::-1], jnp.eye(hessian.shape[0], dtype=hessian.dtype), lower=False
    )


class Factor(NamedTuple):
    """U of a Hessian in its own unit, and the damping that made it positive definite."""

    hinv_chol: jax.Array  # (C, C), of H / unit(H)
    damping: float


@jax.jit
def _factor(hessian: jax.Array, damping: jax.Array) -> jax.Array:
    return inverse_cholesky(damp(hessian / unit(hessian), damping))


def factorize(hessian: jax.Array, damping: float, name: str = "Hessian") -> Factor:
    """U of the damped H / unit(H); damping is raised tenfold until the factor exists.

    Args:
      hessian: (C, C) mean x x^T.
      damping: fraction of the mean diagonal of live columns, tried first.
      name: the layer, for messages.

    Raises:
      ValueError: H has NaN or infinite entries, or no damping up to 1 helps.
    """
    if not bool(jnp.all(jnp.isfinite(hessian))):
        raise ValueError(
            f"{name}: the Hessian has NaN or infinite entries, so the activations that went into "
            "it had; check the model's weights and the calibration text"
        )
    tried = damping
    while tried <= 1.0:
        hinv_chol = _factor(hessian, jnp.float32(tried))
        if bool(jnp.all(jnp.isfinite(hinv_chol))):
            if tried > damping:
                logging.warning(
                    "%s: the Hessian is not positive definite with damping %g; used %g",
                    name,
                    damping,
                    tried,
                )
            return Factor(hinv_chol, tried)
        tried = max(10 * tried, 1e-4)
    raise ValueError(
        f"{name}: the Hessian is not positive definite even with damping {tried / 10:g}; "
        "calibrate on more tokens (calibration.num_windows)"
    )
