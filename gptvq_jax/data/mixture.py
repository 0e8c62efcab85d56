"""Several texts as one: how many windows each gets, and in which order they stand."""

import math
from collections.abc import Sequence

import numpy as np


def shares(count: int, weights: Sequence[float]) -> list[int]:
    """Splits a count in proportion to weights: each part is rounded down or up, the sum is exact.

    What rounding down leaves goes to the largest fractions, of equal ones to the first.

    Args:
      count: at least 0.
      weights: above 0.
    """
    exact = [count * weight / math.fsum(weights) for weight in weights]
    parts = [math.floor(part) for part in exact]
    by_fraction = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    for index in by_fraction[: count - sum(parts)]:
        parts[index] += 1
    return parts


def interleaved(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of all parts, each spread evenly: the first half of them is half of every part.

    Args:
      parts: arrays (n_i, ...); their own order is kept.
    """
    places = np.concatenate([(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in parts])
    return np.concatenate(parts)[np.argsort(places, kind="stable")]
