"""What becomes of freed memory, where the C library is glibc: back to the system, or kept."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # from malloc.h


def return_freed_memory() -> bool:
    """Large arrays go back to the system when freed; returns whether that could be asked for.

    By default it learns to keep blocks of up to 32 MiB, and peak memory drifts with the order in
    which the arrays of a block come and go.
    """
    return _set(_MMAP_THRESHOLD, 4 << 20)


def keep_freed_memory() -> bool:
    """Arrays of up to 32 MiB are kept when freed; for programs that run again and again.

    A server's step takes the same buffers each time: new to the process they cost page faults,
    more than two thirds of a step of 8 requests on 2 cores.
    """
    return _set(_MMAP_THRESHOLD, 32 << 20) and _set(_TRIM_THRESHOLD, 256 << 20)


def _set(parameter: int, value: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and mallopt(parameter, value) == 1
