"""What a code of L bits a window and K bits a weight makes of a unit Gaussian, as measured.

The least possible mean squared error at K bits is 4^-K. A trellis code comes within a factor of it,
its excess, that falls with L and rises with K; it does so where it is searched for at a spread of
its own: few values want to be spread, many to stay within the table. tests/moves/make_excess.py
measures both through moves/viterbi.py.
"""

import numpy as np

from gptvq_jax.core.trellis_tensor import MAX_RATE

# Of each L: (spread, excess) at K = 1 up.
MEASURED = {
    4: ((1.09, 1.26), (0.9, 1.57), (0.76, 1.86), (0.68, 2.51)),
    5: ((1.11, 1.22), (0.91, 1.43), (0.82, 1.58), (0.72, 1.98), (0.61, 2.67)),
    6: ((1.12, 1.18), (0.92, 1.29), (0.85, 1.52), (0.79, 1.73), (0.68, 2.04), (0.61, 2.69)),
    7: ((1.09, 1.15), (0.92, 1.25), (0.87, 1.37), (0.8, 1.56), (0.72, 1.86), (0.67, 2.14)),
    8: ((1.1, 1.13), (0.93, 1.2), (0.88, 1.29), (0.82, 1.46), (0.76, 1.7), (0.72, 1.87)),
    9: ((1.14, 1.11), (0.95, 1.17), (0.9, 1.22), (0.87, 1.32), (0.81, 1.46), (0.78, 1.65)),
    10: ((1.13, 1.09), (0.96, 1.15), (0.9, 1.19), (0.87, 1.24), (0.84, 1.34), (0.77, 1.55)),
    11: ((1.14, 1.08), (0.99, 1.13), (0.92, 1.16), (0.9, 1.2), (0.87, 1.29), (0.81, 1.45)),
    12: ((1.13, 1.07), (1.01, 1.11), (0.95, 1.14), (0.91, 1.17), (0.91, 1.22), (0.85, 1.32)),
    13: ((1.14, 1.06), (0.98, 1.1), (0.97, 1.12), (0.92, 1.14), (0.91, 1.19), (0.88, 1.24)),
    14: ((1.15, 1.06), (1.0, 1.09), (0.98, 1.11), (0.94, 1.13), (0.91, 1.16), (0.91, 1.21)),
    15: ((1.14, 1.06), (1.0, 1.08), (0.98, 1.1), (0.95, 1.11), (0.94, 1.15), (0.94, 1.18)),
    16: ((1.14, 1.05), (1.02, 1.07), (0.97, 1.09), (0.97, 1.11), (0.95, 1.13), (0.93, 1.15)),
}


def distortion(window_bits: int) -> np.ndarray:
    """D(K) for K = 0 up to the highest rate of L: mean squared error of a unit Gaussian."""
    excess = [of_rate[1] for of_rate in MEASURED[window_bits]]
    return np.array([1.0, *(e * 4.0**-k for k, e in enumerate(excess, 1))])


def spread(window_bits: int) -> np.ndarray:
    """(MAX_RATE + 1,) of the variance that a column is searched for at, by K; 1 at no such rate."""
    spreads = [1.0, *(of_rate[0] for of_rate in MEASURED[window_bits])]
    return np.array(spreads + [1.0] * (MAX_RATE + 1 - len(spreads)), np.float32)
