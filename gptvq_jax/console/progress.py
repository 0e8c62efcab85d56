"""The progress bar of long runs: steps done, elapsed time, ETA, what is going on.

Steps are what is shown; work, in any unit, is what the bar and its ETA go by, so that a small layer
is not taken for a large one.
"""

import threading
import time
from collections.abc import Callable

from tqdm import tqdm

from gptvq_jax.console import compile_time
from gptvq_jax.console.compile_time import CompileTime
from gptvq_jax.files import sharing

_FORMAT = "{l_bar}{bar}| {count} [{elapsed}, ETA {left}{postfix}]"
_LEAST = 0.01  # of the time so far: where less of it was no compilation, it tells nothing of a step


class Eta:
    """Seconds left, from the work done and the time it took.

    Programs are compiled in the first steps, and serve all others: seconds of compilation are not
    what the work to come will take.

    Args:
      clock: seconds, rising.
      compiling: by the same clock.
    """

    def __init__(self, clock: Callable[[], float], compiling: CompileTime):
        self._clock, self._compiling = clock, compiling
        self._start, self._work = clock(), 0.0
        self._idle, self._idle_since = 0.0, None  # seconds that were waited for others
        self._per_work: float | None = None  # seconds, as somebody expects

    def skip(self) -> None:
        """What came before the first step is not a part of it."""
        if not self._work:
            self._start, self._idle = self._clock(), 0.0

    def expect(self, per_work: float) -> None:
        """Seconds that work is expected to take, which count until some is done."""
        self._per_work = per_work

    def pause(self) -> None:
        """Nothing is done from here on until `go_on`, and nothing known of what is to come."""
        if self._idle_since is None:
            self._idle_since = self._clock()

    def go_on(self) -> None:
        if self._idle_since is not None:
            self._idle += self._clock() - max(self._idle_since, self._start)
            self._idle_since = None

    @property
    def is_expected(self) -> bool:
        """Whether what is known is what somebody expects, not yet what was seen."""
        return not self._work and self._per_work is not None

    def done(self, work: float) -> None:
        self._work += work

    def seconds(self, left: float) -> float | None:
        """Of the work that is left; None as long as nothing is known."""
        if self._idle_since is not None:
            return None
        elapsed = self._clock() - self._start - self._idle
        if self.is_expected:
            rest = left * self._per_work - elapsed
            return rest if rest > 0 else None
        working = elapsed - self._compiling.since(self._start)
        if not self._work or working < _LEAST * elapsed:
            return None
        return left * working / self._work


class _Bar(tqdm):
    """Shows a count and an ETA of our own."""

    def __init__(self, count: str, left: str, **options):
        self.count, self.left = count, left
        super().__init__(bar_format=_FORMAT, dynamic_ncols=True, **options)

    @property
    def format_dict(self):
        return {**super().format_dict, "count": self.count, "left": self.left}


class Progress:
    """A bar over a known number of steps, which any thread may count.

    Args:
      total: steps, shown as whole numbers.
      description: of what is done.
      unit: of a step, in the singular.
      work: of all steps together, in any unit, such as FLOP; default: every step is 1.
      clock: seconds, rising.
      compiling: by the same clock.

    Attributes:
      seconds_left: as shown, what was known at the last step; None: nothing yet.
    """

    def __init__(
        self,
        total: float,
        description: str,
        unit: str,
        work: float | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        compiling: CompileTime = compile_time.PROCESS,
    ):
        self._total, self._steps, self._unit = total, 0.0, unit
        self._steps_are_work = work is None
        self._all_work, self._work = total if work is None else work, 0.0
        self._at_least = False
        self.seconds_left: float | None = None
        self._eta, self._lock = Eta(clock, compiling), threading.Lock()
        self._bar = _Bar(*self._texts(), total=1.0, desc=description, disable=not sharing.writes())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def skip(self, steps: float, work: float | None = None) -> None:
        """Steps that an earlier run finished: they count as done, but not towards the ETA."""
        with self._lock:
            self._eta.skip()
            self._add(steps, self._work_of(steps, work))
        self._bar.refresh()

    def expect(self, seconds: float, at_least: bool = False) -> None:
        """What the steps that are left will take, from elsewhere: the ETA until one is done.

        Args:
          seconds: of all of them.
          at_least: whether that is a bound from below, which the ETA says.
        """
        with self._lock:
            left = self._all_work - self._work
            if left > 0:
                self._eta.expect(seconds / left)
                self._at_least = at_least
            self._update()
        self._bar.refresh()

    def note(self, text: str) -> None:
        """Says what is going on."""
        with self._lock:
            self._eta.go_on()
            if self._eta.is_expected:
                self._update()
        self._bar.set_postfix_str(text)

    def wait(self, text: str) -> None:
        """Says, as often as it is called, what is waited for: no ETA, and no part of the next."""
        with self._lock:
            self._eta.pause()
            self._update()
        self._bar.set_postfix_str(text)

    def advance(self, text: str = "", steps: float = 1, work: float | None = None) -> None:
        """Counts finished steps, and their work, in the unit of the work of all."""
        work = self._work_of(steps, work)
        if text:
            self._bar.set_postfix_str(text, refresh=False)
        with self._lock:
            self._eta.go_on()
            self._eta.done(work)
            self._add(steps, work)

    def _work_of(self, steps: float, work: float | None) -> float:
        if (work is None) != self._steps_are_work:
            raise ValueError("give the work of all steps and of each step, or of none")
        return steps if work is None else work

    def _add(self, steps: float, work: float) -> None:
        self._steps += steps
        self._work += work
        self._update()
        # Sums of large numbers may end beside their total.
        whole = self._steps >= self._total
        part = 1.0 if whole else min(1.0, self._work / (self._all_work or 1))
        self._bar.update(part - self._bar.n)

    def _update(self) -> None:
        self.seconds_left = self._eta.seconds(max(0.0, self._all_work - self._work))
        self._bar.count, self._bar.left = self._texts()

    def _texts(self) -> tuple[str, str]:
        count = f"{self._steps:.0f}/{self._total:.0f} {self._unit}s"
        seconds = self.seconds_left
        bound = "at least " * (self._at_least and self._eta.is_expected)
        return count, "?" if seconds is None else bound + tqdm.format_interval(seconds)
