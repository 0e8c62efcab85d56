"""Independent pieces of work at once, where the device is a CPU.

XLA splits what is large over the cores; a column sweep is a long row of small steps, and compiling
is one thread's work. Both leave the lock of Python, so threads do.
"""

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax


def parallel(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """[function(item) for item in items], computed; not to be called from inside such a function.

    Order and results are those of the loop, whatever the number of cores.
    """
    items = list(items)
    if jax.default_backend() != "cpu" or len(items) < 2 or num_workers() < 2:
        return [function(item) for item in items]

    def computed(item):
        return jax.block_until_ready(function(item))

    return list(_pool().map(computed, items))


def num_workers() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_workers(), thread_name_prefix="layers")
