"""The multiple-choice knapsack: one choice for each item, least loss within a budget of bytes.

A price per byte turns the budget into a cost: at the least price at which the cheapest choice of
every item fits, these choices are close to the best ones, and any others cost more by what they are
dearer plus the price of the bytes they leave unspent. A dynamic programme over all others whose
extra cost is within a bound finds the best; the bound starts small and grows until one is found.
Sizes are integers throughout, so the budget is kept to the byte.
"""

import bisect
from collections.abc import Sequence

import numpy as np

Item = tuple[np.ndarray, np.ndarray]  # losses float64 and sizes int64 of the choices


def choose(
    losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int
) -> list[int]:
    """The choice for every item that minimises the sum of losses; exact but for float64 rounding.

    Args:
      losses: of every choice of every item.
      sizes: bytes, in the same order.
      budget: most bytes of all choices together.

    Raises:
      ValueError: even the smallest choices do not fit.
    """
    room = budget - sum(min(of_item) for of_item in sizes)
    if room < 0:
        raise ValueError(f"the smallest choices take {budget - room} bytes, the budget is {budget}")
    items = [
        (np.asarray(loss, np.float64), np.asarray(size, np.int64) - min(size))
        for loss, size in zip(losses, sizes, strict=True)
    ]
    price, start = _price(items, room)
    changes = [
        (loss - loss[k], size - size[k]) for (loss, size), k in zip(items, start, strict=True)
    ]
    room -= _spent(items, start)
    gap = price * room  # by how much `start` can be above the best
    bound = gap / 1024
    while bound < 4 * gap:
        extra, other = _search(changes, price, room, bound)
        if extra <= bound:
            return [other.get(i, k) for i, k in enumerate(start)]
        bound *= 4
    return start


def _price(items: Sequence[Item], room: int) -> tuple[float, list[int]]:
    """The least price of a byte at which the cheapest choices fit, and these choices."""

    def cheapest(price: float) -> list[int]:
        return [int(np.lexsort((size, loss + price * size))[0]) for loss, size in items]

    prices = [0.0]  # at which an item turns from one choice to another
    for loss, size in items:
        saved, cost = loss[:, None] - loss, size - size[:, None]
        better = (saved > 0) & (cost > 0)
        prices.extend(saved[better] / cost[better])
    prices = np.unique([*prices, 2 * max(prices)])  # at the last one the smallest are cheapest
    first = bisect.bisect_left(prices, True, key=lambda p: _spent(items, cheapest(p)) <= room)
    return float(prices[first]), cheapest(prices[first])


def _spent(items: Sequence[Item], chosen: Sequence[int]) -> int:
    return sum(int(size[k]) for (_, size), k in zip(items, chosen, strict=True))


def _search(
    changes: Sequence[Item], price: float, room: int, bound: float
) -> tuple[float, dict[int, int]]:
    """Extra cost of the best choices, if it is within the bound, and the choices that it changes.

    Args:
      changes: losses and sizes of every choice, less those of the choice to start from.
      price: of a byte.
      room: bytes that the start leaves unspent.
      bound: most extra cost; where nothing is within it, the result is above it.
    """
    near = {
        i: np.flatnonzero(loss + price * size <= bound) for i, (loss, size) in enumerate(changes)
    }
    near = {i: choices for i, choices in near.items() if len(choices) > 1}
    # Bytes that the items to come will free at most, and take at most.
    ahead = [changes[i][1][choices] for i, choices in reversed(near.items())]
    least = np.cumsum([0, *(size.min() for size in ahead)])[-2::-1]
    most = np.cumsum([0, *(size.max() for size in ahead)])[-2::-1]
    loss, size, history = np.zeros(1), np.zeros(1, np.int64), []
    for (i, choices), freed, taken in zip(near.items(), least, most, strict=True):
        # States of all items so far; those before are rows, the choices of this item columns.
        loss = (loss[:, None] + changes[i][0][choices]).ravel()
        size = (size[:, None] + changes[i][1][choices]).ravel()
        unspent = np.maximum(room - size - taken, 0)
        open_ = np.flatnonzero(
            (size + freed <= room) & (loss + price * size <= bound) & (price * unspent <= bound)
        )
        order = open_[np.lexsort((loss[open_], size[open_]))]
        # Of two states the larger one is kept only for less loss.
        lowest = np.minimum.accumulate(np.append(np.inf, loss[order]))[:-1]
        kept = order[loss[order] < lowest]
        loss, size = loss[kept], size[kept]
        history.append(kept)
    if not len(loss):
        return np.inf, {}
    state = int(np.argmin(loss))
    extra = float(loss[state]) + price * room
    other = {}
    for (i, choices), kept in zip(reversed(near.items()), reversed(history), strict=True):
        state, choice = divmod(int(kept[state]), len(choices))
        other[i] = int(choices[choice])
    return extra, other
