"""When requests ended, and so how long one that finds no room has to wait for it."""

import math
import time
from collections import deque
from collections.abc import Callable

_KEPT = 32  # ends that are remembered
_LONGEST = 600  # seconds that are ever said


class Departures:
    """The latest ends of requests.

    Args:
      clock: seconds, rising.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._start = clock, clock()
        self._ends: deque[float] = deque(maxlen=_KEPT)

    def begin(self) -> None:
        """Work begins after there was none: what was before says nothing of its pace."""
        self._ends.clear()
        self._start = self._clock()

    def note(self) -> None:
        """A request ends."""
        if len(self._ends) == _KEPT:
            self._start = self._ends[0]
        self._ends.append(self._clock())

    def seconds_until(self, count: int) -> int:
        """In which `count` more will have ended at the pace of the latest: whole, at least 1.

        Before the first end, as long as has been waited for it, for each.
        """
        each = (self._clock() - self._start) / max(1, len(self._ends))
        return max(1, min(_LONGEST, math.ceil(count * each)))
