"""How many bits each column gets: water-filling over whole bits, in closed form (WaterSIC).

A column j of rate K adds v_j D(K) to the loss, v_j what it adds when it is zero and D(K) the error
of a code of K bits for a unit Gaussian (excess.py). D falls by ever less, so the exact allocation
takes the bits one by one, the one that lowers the loss most for its cost first (arXiv 2603.04956).
The same holds for all columns of all layers together, their v in one currency.
"""

import numpy as np


def water_fill(
    values: np.ndarray, costs: np.ndarray, budget: float, distortion: np.ndarray
) -> np.ndarray:
    """Rates (n,) of least sum of v D(K) with a sum of cost K of at most the budget.

    Exact where all costs are equal; otherwise the last bits may go to what still fits.

    Args:
      values: v (n,), at least 0.
      costs: (n,) of a bit of each column, above 0.
      budget: for all bits.
      distortion: D(K), K = 0 to the highest rate; convex.
    """
    most = len(distortion) - 1
    gains = np.asarray(values, np.float64)[:, None] * -np.diff(distortion)  # (n, most)
    gains /= np.asarray(costs)[:, None]
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


def price(
    values: np.ndarray, costs: np.ndarray, rates: np.ndarray, distortion: np.ndarray
) -> float:
    """What the next unit of a budget that is spent on rates lowers the loss by; 0 if all are full.

    Arguments are those of `water_fill`, and the rates that it found.
    """
    drops = np.append(-np.diff(distortion), 0.0)
    return float(np.max(np.asarray(values) * drops[rates] / costs, initial=0.0))
