"""Standard errors of what is measured on windows of text.

Tokens of one window depend on each other, so windows are the samples. They come from one text, and
are taken as independent, which consecutive ones are not quite.
"""

from collections.abc import Sequence

import numpy as np

_RESAMPLES, _SEED = 1000, 0


def of_mean(values: np.ndarray) -> float | None:
    """Of the mean of all values: that of the means of windows.

    Args:
      values: (windows, tokens).

    Returns:
      None for one window; nan where a value is not finite.
    """
    if len(values) < 2:
        return None
    with np.errstate(invalid="ignore"):
        means = values.mean(axis=1, dtype=np.float64)
        return float(means.std(ddof=1) / np.sqrt(len(means)))


def of_quantiles(values: np.ndarray, levels: Sequence[float]) -> list[float | None]:
    """Of quantiles of all values, by a bootstrap over windows, with a fixed seed.

    A quantile of a sample of windows is the smallest of their values that has at least the share
    `level` of them at or below it.

    Args:
      values: (windows, tokens).
      levels: from 0 to 1.

    Returns:
      As `of_mean`, for each level.
    """
    count = len(values)
    if count < 2:
        return [None] * len(levels)
    if not np.isfinite(values).all():
        return [np.nan] * len(levels)
    order = np.argsort(values, axis=None, kind="stable")
    window = (order // values.shape[1]).astype(np.int32)
    ordered = values.ravel()[order]
    ranks = np.maximum(1, np.ceil(np.asarray(levels) * values.size))
    draws = np.random.default_rng(_SEED).multinomial(count, [1 / count] * count, _RESAMPLES)
    found = [ordered[np.searchsorted(np.cumsum(times[window]), ranks)] for times in draws]
    return list(map(float, np.std(found, axis=0, ddof=1, dtype=np.float64)))
