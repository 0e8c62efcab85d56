"""Memory that stays with the process between calls of the same programs, where that saves time."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

# From malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
_LARGEST_THRESHOLD = 32 << 20  # that glibc takes
_FREED_AT_ONCE = 4 << 20  # of other jobs (console/cli.py)


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Freed arrays do not go back to the system at once, where the C library is glibc.

    A step that a program repeats thousands of times takes the same memory each time, and a page
    that the system hands out anew is zeroed first. Tuning SmolLM2-135M on 2 cores in a virtual
    machine spends a third of its time on that otherwise. Threads share what is free only if they
    begin in this context: it does most before JAX has computed anything.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_TOP_PAD, 256 << 20)
    mallopt(_ARENA_MAX, 1)
    try:
        yield
    finally:
        # As other jobs have it, and what is free goes back now.
        mallopt(_MMAP_THRESHOLD, _FREED_AT_ONCE)
        mallopt(_TRIM_THRESHOLD, 128 << 10)
        mallopt(_TOP_PAD, 128 << 10)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
