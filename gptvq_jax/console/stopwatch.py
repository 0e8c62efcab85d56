"""Where the time goes: what a run takes in all, and in each of its stages.

What is measured is the process while some thread is in the stage: wall seconds, CPU seconds of all
threads, seconds in which something compiled, bytes read and written. A stage that two threads are
in at once counts once, and two stages that overlap count both; "elsewhere" is when there was none.
Only the arithmetic belongs to one thread: `flops` adds to the stage that this thread is in.
"""

import contextlib
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gptvq_jax.console import compile_time
from gptvq_jax.console.compile_time import CompileTime
from gptvq_jax.console.processor import processor_name
from gptvq_jax.console.spans import Spans

ELSEWHERE = "elsewhere"  # what is in no stage
# What is known of a stage; None where it was not measured.
FIELDS = ("seconds", "cpu_seconds", "compile_seconds", "tflop", "bytes_read", "bytes_written")
_IO = Path("/proc/self/io")  # of Linux


class _Used(NamedTuple):
    """By the process so far."""

    cpu_seconds: float
    bytes_read: int | None  # by calls: what a map of a file reads is not in it
    bytes_written: int | None

    def plus(self, after: "_Used", before: "_Used") -> "_Used":
        return _Used(*(
            None if total is None or b is None or a is None else total + b - a
            for total, a, b in zip(self, before, after, strict=True)
        ))  # fmt: skip


def used() -> _Used:
    """What this process used so far, with the threads of JAX."""
    try:
        lines = _IO.read_text().splitlines()
        counts = {name: int(value) for name, value in (line.split(":") for line in lines)}
    except (OSError, ValueError):
        counts = {}
    return _Used(time.process_time(), counts.get("rchar"), counts.get("wchar"))


class _Account:
    """Of one stage; what it says holds once nobody is in it."""

    def __init__(self):
        self.inside = 0  # threads
        self.spans = Spans()
        self.total = _Used(0.0, 0, 0)
        self.flop: float | None = None

    def enter(self, now: float, by_now: _Used) -> None:
        if not self.inside:
            self._start, self._before = now, by_now
        self.inside += 1

    def leave(self, now: float, by_now: _Used) -> None:
        self.inside -= 1
        if not self.inside:
            self.spans.add(self._start, now)
            self.total = self.total.plus(by_now, self._before)


class Stopwatch:
    """Adds up what stages take; any thread may enter any of them.

    Args:
      clock: seconds, rising.
      compiling: by the same clock.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        compiling: CompileTime = compile_time.PROCESS,
    ):
        self._clock, self._compiling = clock, compiling
        self._lock, self._thread = threading.RLock(), threading.local()
        self._stages: dict[str, _Account] = {}
        self._any = _Account()
        self._elsewhere_flop: float | None = None
        self._begun = clock(), used()
        self.failed: str | None = None  # the innermost stage that an exception has left, the last

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts what happens inside the `with` block towards a stage."""
        with self._lock:
            account = self._stages.setdefault(name, _Account())
            now = self._clock(), used()
            account.enter(*now)
            self._any.enter(*now)
        outer = getattr(self._thread, "account", None)
        self._thread.account = account
        inner = self.failed
        try:
            yield
        except Exception:
            self.failed = name if self.failed is inner else self.failed
            raise
        finally:
            self._thread.account = outer
            with self._lock:
                now = self._clock(), used()
                account.leave(*now)
                self._any.leave(*now)

    def flops(self, flop: float) -> None:
        """Adds floating-point operations of matrix products to the stage that this thread is in.

        A driver calls it where it calls a compiled program, with a formula of core/flops.py or
        models/flops.py for the shapes that it passes: JAX itself need not have finished.

        Args:
          flop: of one call, multiplications and additions.
        """
        account = getattr(self._thread, "account", None)
        with self._lock:
            if account is None:
                self._elsewhere_flop = (self._elsewhere_flop or 0.0) + flop
            else:
                account.flop = (account.flop or 0.0) + flop

    @property
    def total(self) -> float:
        """Seconds since this stopwatch was made."""
        return self._clock() - self._begun[0]

    def summary(self) -> dict[str, Any]:
        """What a run writes into its summary; read it with `stages_of` and `totals_of`.

        Returns:
          seconds, compile_seconds: of the run so far.
          processor: what it ran on.
          stages: {name: FIELDS}, in the order in which they were first entered, and "elsewhere".
            A stage that some thread is in counts as it was when it was last empty.
          totals: FIELDS of the run.
        """
        with self._lock:
            stages = {name: self._row(account) for name, account in self._stages.items()}
            whole = _Account()
            whole.enter(*self._begun)
            whole.leave(self._clock(), used())
            flops = [a.flop for a in self._stages.values()] + [self._elsewhere_flop]
            counted = [flop for flop in flops if flop is not None]
            whole.flop = sum(counted) if counted else None
            totals, inside = self._row(whole), self._row(self._any)
        rest = {name: _less(totals[name], inside[name]) for name in FIELDS}
        rest["tflop"] = None if self._elsewhere_flop is None else self._elsewhere_flop / 1e12
        return {
            "seconds": totals["seconds"],
            "compile_seconds": totals["compile_seconds"],
            "processor": processor_name(),
            "stages": {**stages, ELSEWHERE: rest},
            "totals": totals,
        }

    def _row(self, account: _Account) -> dict[str, float | None]:
        return {
            "seconds": account.spans.seconds,
            "cpu_seconds": account.total.cpu_seconds,
            "compile_seconds": self._compiling.within(account.spans),
            "tflop": None if account.flop is None else account.flop / 1e12,
            "bytes_read": account.total.bytes_read,
            "bytes_written": account.total.bytes_written,
        }


def _less(whole: float | None, part: float | None) -> float | None:
    return None if whole is None or part is None else max(0, whole - part)


def stages_of(summary: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """{stage: FIELDS} of a summary; older ones have seconds alone."""
    nothing = dict.fromkeys(FIELDS)
    return {
        name: nothing | (row if isinstance(row, dict) else {"seconds": row})
        for name, row in summary["stages"].items()
    }


def totals_of(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """FIELDS of the whole run."""
    known = {name: summary[name] for name in ("seconds", "compile_seconds")}
    return dict.fromkeys(FIELDS) | known | summary.get("totals", {})


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
