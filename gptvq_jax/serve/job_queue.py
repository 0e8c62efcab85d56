"""Requests on their way into an engine: which wait, how many there are, whether more are taken."""

import threading
from collections import deque
from collections.abc import Sequence

from gptvq_jax.serve.departures import Departures
from gptvq_jax.serve.requests import Job


class EngineFull(Exception):
    """As many requests as may wait are waiting, or the engine is closed.

    Args:
      message: one line.
      seconds: after which there may be room, at the pace of the latest; None: never.
    """

    def __init__(self, message: str, seconds: int | None = None):
        super().__init__(message)
        self.seconds = seconds


class JobQueue:
    """Any thread may add requests; one thread takes them, and says of each when it has ended.

    Args:
      most: requests that there may be, those that were taken and have not ended among them.
    """

    def __init__(self, most: int):
        self.most = most
        self.waiting: deque[Job] = deque()
        self._lock = threading.Lock()
        self._count, self._closed = 0, False
        self._departures = Departures()

    @property
    def count(self) -> int:
        """Requests that wait, or were taken and have not ended."""
        return self._count

    @property
    def closed(self) -> bool:
        """Whether it takes no further requests."""
        return self._closed

    def add(self, jobs: Sequence[Job]) -> None:
        """Adds all, or none.

        Raises:
          EngineFull: there are too many, or it is closed.
        """
        with self._lock:
            if self._closed:
                raise EngineFull("the engine is closed")
            too_many = self._count + len(jobs) - self.most
            if too_many > 0:
                raise EngineFull(
                    f"{self._count} requests are worked on or wait already",
                    self._departures.seconds_until(too_many),
                )
            if not self._count:
                self._departures.begin()
            self._count += len(jobs)
            self.waiting.extend(jobs)

    def close(self) -> None:
        """Takes no further requests."""
        with self._lock:
            self._closed = True

    def take(self) -> Job | None:
        """The request that has waited longest."""
        with self._lock:
            return self.waiting.popleft() if self.waiting else None

    def take_cancelled(self) -> list[Job]:
        """Those among the waiting that nobody wants any more."""
        with self._lock:
            cancelled = [job for job in self.waiting if job.cancelled]
            self.waiting = deque(job for job in self.waiting if not job.cancelled)
        return cancelled

    def take_all(self) -> list[Job]:
        """All that wait."""
        with self._lock:
            jobs = list(self.waiting)
            self.waiting.clear()
        return jobs

    def ended(self) -> None:
        """One that was taken has ended."""
        with self._lock:
            self._count -= 1
            self._departures.note()
