"""FLOP of moments, factors and moves: formulas against the traced programs, and by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jaxpr_flops import count

from gptvq_jax.core import flops
from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.hessian import (
    Moment,
    add_inputs,
    add_products,
    asymmetric_target,
    inverse_cholesky,
    tile_size,
)
from gptvq_jax.core.metrics import quadratic_loss
from gptvq_jax.moves.recode import recode
from gptvq_jax.moves.refit import refit
from gptvq_jax.moves.residual import Residual, residual_of
from gptvq_jax.moves.sweep import sweep


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


# --- the counter itself


def test_products_are_counted_by_hand():
    assert count(jnp.matmul, array(3, 5), array(5, 7)) == 2 * 3 * 5 * 7 == flops.product(3, 5, 7)
    outer = count(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), array(2, 3, 5), array(2, 7, 5))
    assert outer == 2 * 2 * 3 * 5 * 7
    image, kernel = array(2, 8, 8, 3), array(3, 3, 3, 4)
    numbers = ("NHWC", "HWIO", "NHWC")
    convolution = count(
        lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=numbers),
        image,
        kernel,
    )
    assert convolution == 2 * (2 * 6 * 6 * 4) * (3 * 3 * 3)
    assert count(jnp.linalg.cholesky, array(4, 6, 6)) == 4 * 6**3 / 3
    assert count(jnp.linalg.inv, array(4, 6, 6)) == 4 * (2 * 6**3 / 3 + 2 * 6**3)
    assert count(jnp.tanh, array(9)) == 0


def test_loops_branches_and_calls():
    square = array(4, 4)

    def scanned(x):
        return lax.fori_loop(0, 5, lambda i, c: c @ c, x)

    def branched(x):
        return lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    def until(x):
        return lax.while_loop(lambda x: (x @ x)[0, 0] < 1, lambda x: x @ x, x)

    one = flops.product(4, 4, 4)
    assert count(scanned, square) == 5 * one
    assert count(branched, square) == 2 * one
    assert count(jax.jit(scanned), square) == 5 * one
    assert count(jax.checkpoint(jax.vmap(scanned)), array(3, 4, 4)) == 15 * one
    assert count(until, square, trips=3) == 6 * one
    with pytest.raises(ValueError, match="pass its number of trips"):
        count(until, square)
    steps = lax.while_loop  # without products its trips do not matter
    assert count(lambda x: steps(lambda x: x < 9, lambda x: x + 1, x), array()) == 0


def test_what_nothing_depends_on_is_not_executed():
    @jax.jit
    def two(x):
        return x @ x, x @ x @ x

    assert count(lambda x: two(x)[0], array(4, 4)) == flops.product(4, 4, 4)


# --- moments and factors


def test_moments():
    moment = Moment(array(7, 7), array())
    x, w = array(3, 20, 7), array(3, 20)
    assert count(add_inputs, moment, x, w) == flops.second_moment(60, 7, tile_size(7))
    whole = flops.second_moment(60, 7)
    assert count(add_products, moment, x, x, w) == flops.cross_moment(60, 7, 7) == whole
    assert whole == 2 * 60 * 49


def test_a_moment_takes_5_of_8_parts_of_its_square():
    moment, x = Moment(array(576, 576), array()), array(10, 576)
    assert count(add_inputs, moment, x) == flops.second_moment(10, 576) * 5 / 8


@pytest.mark.parametrize("cols, tile", [(12, 4), (13, 4), (3, 4), (13, 1), (576, 192)])
def test_a_symmetric_moment_in_tiles(cols, tile):
    def upper(x, w):
        parts = [x[:, i : i + tile] for i in range(0, cols, tile)]
        return [
            (a * w[:, None]).T @ b for i, a in enumerate(parts) for b in parts[i:]
        ]  # of those on the diagonal the whole tile

    expected = count(upper, array(50, cols), array(50))
    assert flops.second_moment(50, cols, tile) == expected
    assert expected <= flops.second_moment(50, cols) == flops.second_moment(50, cols, cols)
    if tile == 1:
        assert expected == 50 * cols * (cols + 1)


def test_factor():
    assert count(inverse_cholesky, array(48, 48)) == flops.inverse_cholesky(48)
    assert flops.inverse_cholesky(48) == 48**3 * 4 / 3


# --- units of the maths of a layer

ROWS, COLS, BLOCK = 96, 768, 128
GRID = GroupGrid(ROWS, COLS, dim=2, strip_rows=32, strip_cols=256)
SQUARE, WEIGHT = array(COLS, COLS), array(COLS, ROWS)
RESIDUAL = Residual(WEIGHT, WEIGHT)
CODES = array(2, COLS // 2, ROWS, dtype=jnp.int32)
BOOKS = array(2, 3, 3, 16, 2)
UNIT = flops.unit(ROWS, COLS)


def test_losses_and_targets_are_units():
    assert UNIT == 2 * ROWS * COLS**2
    assert count(quadratic_loss, array(ROWS, COLS), array(ROWS, COLS), SQUARE) == UNIT
    assert count(residual_of, WEIGHT, WEIGHT, SQUARE) == UNIT
    assert count(Residual.moved, RESIDUAL, WEIGHT, SQUARE) == UNIT
    weight = array(ROWS, COLS)
    assert count(asymmetric_target, weight, SQUARE, weight, SQUARE, array()) == 2 * UNIT


@pytest.mark.parametrize("iterations", [0, 6])
def test_refit(iterations):
    counted = count(
        lambda r, h, c: refit(r, h, c, jnp.zeros(CODES.shape, int), None, GRID, iterations),
        RESIDUAL,
        SQUARE,
        BOOKS,
    )
    inner = 2 * (2 * ROWS * COLS) + 2 * (1 + 2 * iterations) * BOOKS.size
    assert counted == flops.refit(ROWS, COLS, iterations) + inner


@pytest.mark.parametrize("passes, beam", [(1, 1), (3, 1), (2, 4)])
def test_recode(passes, beam):
    counted = count(
        lambda *a: recode(*a, None, GRID, passes=passes, beam=beam, block_size=BLOCK),
        RESIDUAL,
        SQUARE,
        BOOKS,
        CODES,
    )
    expected = flops.recode(ROWS, COLS, BLOCK, passes, beam)
    assert expected == passes * beam * UNIT * (COLS + BLOCK) / COLS
    assert expected < counted < 1.02 * expected  # D x D transforms


def test_sweep():
    def fit(data, key):
        return jnp.zeros(BOOKS.shape[2:])

    counted = count(
        lambda w, u: sweep(w, u, GRID, fit, jax.random.key(0), block_size=BLOCK), WEIGHT, SQUARE
    )
    expected = flops.lazy_pass(ROWS, COLS, BLOCK)
    assert expected < counted < 1.02 * expected
