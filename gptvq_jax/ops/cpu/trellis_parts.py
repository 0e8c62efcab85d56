"""Small tables from which a kernel works out the int8 level of a window of 9 to 12 bits.

A table of 2^L levels does not fit in registers. But the rank of a window (core/trellis_table.py) is
the exclusive or of what its lower L - 4 bits and its highest 4 stand for, and levels rise with the
rank, as quantiles of a symmetric distribution. So an upper level is that of the rank's highest 8
bits, plus what its other bits add to it, one of a few slopes; a lower level is a mirrored one. That
is off by 0.0088 standard deviations (L = 12; root of the mean square), where levels rounded to int8
are off by 0.0083.
"""

import functools

import numpy as np

from gptvq_jax.core.trellis_table import gaussian_levels, ranks

FEWEST_BITS, MOST_BITS = 9, 12
_SLOPES = 8
_ROUNDS = 40  # of choosing slopes
_MAX = 127


@functools.cache
def level_parts(bits: int, bias: int) -> tuple[np.ndarray, float]:
    """The tables of windows of L = `bits` bits, and the unit of the levels.

    Args:
      bits: 9 to 12.
      bias: of levels, as they are multiplied.

    Returns:
      (768,) uint8: the highest 8 bits of the rank by the lower bits of a window, 256 numbers that
      repeat; by its highest 4 bits those, and the other bits of the rank, 64 numbers each that
      repeat; by the rank's bits 1 to 7 the level plus `bias`, and 16 times the slope, 128 each; and
      by 16 times the slope plus the rank's other bits what is added, 128.
      The unit.
    """
    rank, below = ranks(bits), bits - 8
    by_low = rank[np.arange(256) % 2 ** (bits - 4)]
    by_high = rank[(np.arange(64) % 16) << (bits - 4)]  # its lowest bits do not depend on others
    upper = gaussian_levels(2**bits).astype(np.float64)[2 ** (bits - 1) :]
    unit = upper[-1] / _MAX
    level, slope, added = _fit(upper.reshape(128, -1) / unit)
    padded = np.zeros((_SLOPES, 16), np.int64)
    padded[:, : 2**below] = added
    tables = (
        by_low >> below,
        (by_high ^ rank[0]) >> below,
        by_high & (2**below - 1),
        level + bias,
        16 * slope,
        padded.reshape(-1),
    )
    parts = np.concatenate([table.astype(np.int16).astype(np.uint8) for table in tables])
    parts.setflags(write=False)
    return parts, float(unit)


def _fit(wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """level (128,), slope (128,), added (slopes, n): integers, level + added[slope] near `wanted`.

    Slopes and what they add are chosen in turn, as in k-means; the steepest rows begin with slopes
    of their own.

    Args:
      wanted: (128, n), ascending.
    """
    level = np.round(wanted.mean(axis=1))
    rise = wanted[:, -1] - wanted[:, 0]
    shared = _SLOPES - 2
    slope = np.minimum(np.cumsum(rise[:-2]) / rise[:-2].sum() * shared, shared - 1).astype(int)
    slope = np.append(slope, [shared, shared + 1])
    for _ in range(_ROUNDS):
        rest = wanted - level[:, None]
        groups = [rest[slope == s] for s in range(_SLOPES)]
        added = np.stack(
            [
                np.round(group.mean(axis=0)) if len(group) else np.zeros(wanted.shape[1])
                for group in groups
            ]
        )
        start = np.round((wanted[:, None] - added).mean(axis=2))  # (128, slopes)
        levels = start[..., None] + np.arange(-1, 2)
        found = np.clip(levels[:, :, None, :] + added[:, :, None], None, _MAX)
        error = ((found - wanted[:, None, :, None]) ** 2).sum(axis=2).reshape(len(wanted), -1)
        best = error.argmin(axis=1)
        slope = best // 3
        level = levels.reshape(len(wanted), -1)[np.arange(len(wanted)), best]
    # As it is added: nothing may leave a byte.
    level = np.minimum(level, _MAX - added[slope].max(axis=1))
    return level.astype(int), slope, added.astype(int)
