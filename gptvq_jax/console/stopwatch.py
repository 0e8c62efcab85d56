"""Where the time goes: wall seconds by stage, and what of them was compilation."""

import contextlib
import resource
import sys
import time
from collections import defaultdict

import jax

_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class Stopwatch:
    """Adds up seconds by stage. Stages do not nest."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.compile_seconds = 0.0
        self._start = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration: float, **_) -> None:
        if event in _COMPILE_EVENTS:
            self.compile_seconds += duration

    @contextlib.contextmanager
    def stage(self, name: str):
        """Counts the time inside the `with` block towards a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    @property
    def total(self) -> float:
        """Seconds since this stopwatch was made."""
        return time.perf_counter() - self._start


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
