"""What the bits of a trellis-coded layer are spent on: rates of its columns, and outliers.

Both have one currency. A bit of a column lowers the loss by v_j (D(K) - D(K + 1)), and the next one
of the whole layer by what rates.price says; 32 bits keep a weight beside the code of its column,
and so spare what that would make of it (outliers.loss_if_coded). What is kept changes v, and with
it the price: a few rounds settle that. In a run the price is one for all layers, because each has
the budget that it gets where all columns are filled together (run/columns.py).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.core.trellis_tensor import count_outliers
from gptvq_jax.methods.trellis_settings import (
    MOST_OUTLIERS,
    OUTLIER_BYTES,
    STANDS_OUT,
    TrellisSettings,
)
from gptvq_jax.moves.excess import distortion
from gptvq_jax.moves.outliers import Aside, deviations, loss_if_coded, set_aside, without
from gptvq_jax.moves.rates import price, water_fill

_ROUNDS = 2  # of outliers at a price and the price that they make


class Demand(NamedTuple):
    """What a layer's bits are allocated by."""

    row_scales: jax.Array  # (R,) float16
    outliers: jax.Array  # (R, C) bool
    values: jax.Array  # (C,) what each column adds to the loss if it is 0 but for outliers
    counts: jax.Array  # (C,) outliers
    crowded: bool = False  # so much stands out that the layer is kept in 8 bits


def demand(weight: jax.Array, hinv_chol: jax.Array, settings: TrellisSettings, most: int) -> Demand:
    """Row scales, outliers and the worth of every column of a weight (R, C), before any price.

    Args:
      most: outliers at most, those that stand out most.
    """
    limit = STANDS_OUT if settings.fixed_limit is None else settings.fixed_limit
    found = _beyond(weight, hinv_chol, limit)
    count = int(jnp.sum(found.counts))
    crowded = settings.may_be_crowded and count > MOST_OUTLIERS * weight.size
    if count > most:
        size = jax.jit(deviations)(weight, Aside(found.row_scales, found.outliers))
        found = _of(weight, hinv_chol, _largest(size, found.outliers, most))
    return found._replace(crowded=crowded)


def spend(
    weight: jax.Array, hinv_chol: jax.Array, settings: TrellisSettings
) -> tuple[Demand, np.ndarray]:
    """Outliers and rates (C,) of a weight (R, C) within the budget of a layer.

    Where it is crowded there are no rates: it is not coded.

    Raises:
      ValueError: the budget is below what is stored beside the codes.
    """
    shape = weight.shape
    most = settings.most_outliers(*shape)
    of_layer = demand(weight, hinv_chol, settings, most)
    if of_layer.crowded:
        return of_layer, np.zeros(0, np.int64)
    rates, worth = choose_rates(of_layer, shape, settings)
    for _ in range(_ROUNDS if settings.fixed_limit is None else 0):
        bits = jnp.asarray(rates, jnp.int32)
        loss = _losses(weight, hinv_chol, of_layer, bits, settings.window_bits)
        kept = loss > OUTLIER_BYTES * worth
        if int(jnp.sum(kept)) > most:
            kept = _largest(loss, kept, most)
        of_layer = _of(weight, hinv_chol, kept)
        rates, worth = choose_rates(of_layer, shape, settings)
    return of_layer, rates


def choose_rates(
    of_layer: Demand, shape: tuple[int, int], settings: TrellisSettings
) -> tuple[np.ndarray, float]:
    """Bits (C,) of every column within the budget of a layer, and the price of a byte.

    Raises:
      ValueError: as `spend`.
    """
    rows, cols = shape
    settings.check_budget(rows, cols)
    kept = count_outliers(places_of(of_layer.outliers))
    fixed = settings.fixed_bytes(rows, cols) + OUTLIER_BYTES * kept
    left = settings.budget_bytes(rows, cols) - fixed
    errors = distortion(settings.window_bits)
    values, costs = np.asarray(of_layer.values), np.full(cols, settings.bytes_per_bit(rows))
    if settings.column_rates:
        rates = water_fill(values, costs, left, errors)
    else:
        rates = np.full(cols, min(max(left, 0) // costs.sum(), settings.most_rate))
        values, costs = np.sum(values, keepdims=True), np.sum(costs, keepdims=True)
    return rates, price(values, costs, rates[: len(values)], errors)


def places_of(outliers: jax.Array) -> np.ndarray:
    """Of outliers (R, C): row + R * column, ascending, as they are stored."""
    return np.flatnonzero(np.asarray(outliers).T)


@jax.jit
def _beyond(weight: jax.Array, hinv_chol: jax.Array, limit: jax.Array) -> Demand:
    return _demand(weight, hinv_chol, set_aside(weight, limit))


@jax.jit
def _of(weight: jax.Array, hinv_chol: jax.Array, outliers: jax.Array) -> Demand:
    return _demand(weight, hinv_chol, without(weight, outliers))


def _demand(weight: jax.Array, hinv_chol: jax.Array, aside: Aside) -> Demand:
    inner = jnp.where(aside.outliers, 0.0, weight)
    values = jnp.sum(jnp.square(inner), axis=0) / jnp.square(jnp.diagonal(hinv_chol))
    return Demand(*aside, values, jnp.sum(aside.outliers, axis=0))


@partial(jax.jit, static_argnames="window_bits")
def _losses(weight, hinv_chol, of_layer: Demand, rates, window_bits):
    metric = 1 / jnp.square(jnp.diagonal(hinv_chol))
    aside = Aside(of_layer.row_scales, of_layer.outliers)
    return loss_if_coded(weight, aside, metric, rates, window_bits)


def _largest(size: jax.Array, among: jax.Array, count: int) -> jax.Array:
    """The `count` largest (R, C) of some; on the host, which is asked for it rarely."""
    size = np.where(among, size, -1.0)
    chosen = np.zeros(size.shape, bool)
    if count:
        chosen.flat[np.argpartition(size, -count, axis=None)[-count:]] = True
    return jnp.asarray(chosen)
