"""How many bits each column gets: water-filling over whole bits, in closed form (WaterSIC).

A column j of rate K adds v_j D(K) to the loss, v_j what it adds when it is zero and D(K) the error
of a code of K bits for a unit Gaussian. D falls by ever less, so the exact allocation takes the
bits one by one, the one that lowers the loss most for its cost first (arXiv 2603.04956). The same
holds for all columns of all layers together, their v in one currency.
"""

import numpy as np

from gptvq_jax.core.trellis_tensor import MAX_RATE

EXCESS = 1.15  # of a trellis code's error over the least possible one, 4^-K


def distortion(rates: np.ndarray) -> np.ndarray:
    """D(K): mean squared error of a unit Gaussian at K bits, 1 at none."""
    rates = np.asarray(rates)
    return np.where(rates == 0, 1.0, EXCESS * 4.0**-rates)


def water_fill(
    values: np.ndarray, costs: np.ndarray, budget: float, most: int = MAX_RATE
) -> np.ndarray:
    """Rates (n,) of least sum of v D(K) with a sum of cost K of at most the budget.

    Exact where all costs are equal; otherwise the last bits may go to what still fits.

    Args:
      values: v (n,), at least 0.
      costs: (n,) of a bit of each column, above 0.
      budget: for all bits.
      most: highest rate.
    """
    drops = -np.diff(distortion(np.arange(most + 1)))  # (most,)
    gains = np.asarray(values, np.float64)[:, None] * drops / np.asarray(costs)[:, None]
    order = np.argsort(-gains, axis=None, kind="stable")
    column = order // most
    cost = np.asarray(costs, np.float64)[column]
    rates = np.zeros(len(values), np.int64)
    spent = np.cumsum(cost)
    fits = int(np.searchsorted(spent, budget * (1 + 1e-12), side="right"))
    np.add.at(rates, column[:fits], 1)
    left = budget - (spent[fits - 1] if fits else 0.0)
    cheapest = min(costs, default=np.inf)
    for item in range(fits, len(order)):
        if left < cheapest:
            break
        j, bit = column[item], order[item] % most
        if rates[j] == bit and cost[item] <= left:
            rates[j] += 1
            left -= cost[item]
    return rates
