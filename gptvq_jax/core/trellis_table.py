"""What a window of L bits stands for: quantiles of a unit Gaussian behind a fixed scrambling.

Windows of neighbouring weights share most of their bits, so the values must look unrelated to
them; and the 2^K windows that a weight can choose from, which differ in their lowest K bits alone,
should be spread evenly over the Gaussian, whatever K is (set partitioning), and likewise the 2^K
that can come before one, which differ in their highest K bits. All at once: bit i of a window,
flipped by a hash of the bits above it and by one of the highest bits, is bit i from the top of a
rank. Beside a random permutation it lowers the error, and as that it takes no room in a file.
"""

import functools

import numpy as np
from scipy.special import ndtri

TABLE_VERSION = 1  # of `ranks`: stored with a tensor, which means nothing without it
MIN_BITS, MAX_BITS = 4, 16  # of a window
_TOP = 4  # highest bits of a window that flip those of its rank


@functools.cache
def ranks(bits: int) -> np.ndarray:
    """The rank of each window of L = `bits` bits, a permutation of 0 to 2^L - 1, int32."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"a window has {MIN_BITS} to {MAX_BITS} bits, not {bits}")
    windows = np.arange(2**bits, dtype=np.uint64)
    rank = np.zeros_like(windows)
    top = min(_TOP, bits // 2)
    for i in range(bits):
        above = (windows & np.uint64(2 ** (bits - top) - 1)) >> np.uint64(i + 1)
        if i + 1 < bits - top:
            flip = _hash(above, i) ^ _bit(windows, bits - 1 - i % top)
        else:
            flip = _hash(windows >> np.uint64(i + 1), i)
        rank = rank * np.uint64(2) + (_bit(windows, i) ^ flip)
    rank = rank.astype(np.int32)
    rank.setflags(write=False)
    return rank


def rank_parts(bits: int) -> tuple[np.ndarray, np.ndarray, int]:
    """`ranks` from two short tables, where 2^L lookups cost more than two and three operations.

    Returns:
      low (2^(S - 1),) and high (2^(L - S),) int32, and S: the rank of a window is the exclusive or
      of low at its bits 1 to S - 1, of high at its bits from S up, and of bit 0 << (L - 1).
    """
    split, rank = bits - min(_TOP, bits // 2), ranks(bits)
    low = rank[np.arange(2 ** (split - 1)) << 1]
    return low, rank[np.arange(2 ** (bits - split)) << split] ^ rank[0], split


def gaussian_levels(count: int) -> np.ndarray:
    """Quantiles (count,) float16 of a Gaussian, ascending, of unit variance together.

    Rounding hides what libraries of different make differ in.
    """
    quantiles = ndtri((np.arange(count) + 0.5) / count)
    return (quantiles / quantiles.std()).astype(np.float16)


@functools.cache
def gaussian_values(bits: int) -> np.ndarray:
    """(2^L,) float32: the quantile of each window."""
    values = gaussian_levels(2**bits).astype(np.float32)[ranks(bits)]
    values.setflags(write=False)
    return values


def _bit(x: np.ndarray, i: int) -> np.ndarray:
    return (x >> np.uint64(i)) & np.uint64(1)


def _hash(x: np.ndarray, i: int) -> np.ndarray:
    """A bit of a 32-bit mixer (multiply and shift) of x and i, uint64."""
    mask = np.uint64(0xFFFFFFFF)
    x = (x * np.uint64(31) + np.uint64(1000003 * i + 7)) & mask
    for factor in (0x7FEB352D, 0x846CA68B):
        x = x ^ (x >> np.uint64(16))
        x = (x * np.uint64(factor)) & mask
        x = x ^ (x >> np.uint64(15))
    return _bit(x, 7)
