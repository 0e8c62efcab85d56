"""When this process compiled: the spans in which some thread traced, lowered or compiled.

JAX reports a duration when it ends, in the thread that waited for it. Reports overlap: the trace of
a function holds those of the functions that it calls, and threads compile side by side. As spans,
every second counts once, so that compilation never takes more than the time it is a part of.
"""

import threading
import time
from collections.abc import Callable

import jax

from gptvq_jax.console.spans import Spans

_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class CompileTime:
    """Collects what JAX reports; a program from the cache counts with the time to read it.

    Args:
      clock: seconds, rising.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._lock, self._spans = clock, threading.Lock(), Spans()

    def on_event(self, event: str, duration: float, **_) -> None:
        """Listens to JAX's durations."""
        if event in _EVENTS:
            with self._lock:
                end = self._clock()
                self._spans.add(end - duration, end)

    def since(self, start: float) -> float:
        """Seconds of compilation that ended by now and are later than `start` by the clock."""
        with self._lock:
            return self._spans.since(start)

    def within(self, spans: Spans) -> float:
        """Seconds of compilation that ended by now, within spans by the same clock."""
        with self._lock:
            return self._spans.shared(spans)


PROCESS = CompileTime()
# Once: JAX keeps its listeners for good.
jax.monitoring.register_event_duration_secs_listener(PROCESS.on_event)
