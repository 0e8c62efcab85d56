"""What becomes of freed memory, where the C library is glibc: back to the system, or kept."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

# From malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
_LARGEST_THRESHOLD = 32 << 20  # that glibc takes


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
    return _set(_MMAP_THRESHOLD, _LARGEST_THRESHOLD) and _set(_TRIM_THRESHOLD, 256 << 20)


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Freed arrays do not go back to the system before the block ends.

    A step that a program repeats thousands of times takes the same memory each time, and a page
    that the system hands out anew is zeroed first. Tuning SmolLM2-135M on 2 cores in a virtual
    machine spends a third of its time on that otherwise. Threads share what is free only if they
    begin in this context: it does most before JAX has computed anything.
    """
    if not _set(_MMAP_THRESHOLD, _LARGEST_THRESHOLD):
        yield
        return
    _set(_TRIM_THRESHOLD, 2**31 - 1)
    _set(_TOP_PAD, 256 << 20)
    _set(_ARENA_MAX, 1)
    try:
        yield
    finally:
        # As other jobs have it, and what is free goes back now.
        return_freed_memory()
        _set(_TRIM_THRESHOLD, 128 << 10)
        _set(_TOP_PAD, 128 << 10)
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _set(parameter: int, value: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and mallopt(parameter, value) == 1
