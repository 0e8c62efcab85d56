"""The thread that runs an engine's steps while others submit requests."""

import threading

from absl import logging

from gptvq_jax.serve.engine import Engine
from gptvq_jax.serve.requests import Job, Listener, Request


class EngineThread:
    """Runs steps as long as there are requests, and waits for some otherwise.

    Args:
      engine: only this thread steps it.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._work = threading.Event()
        # A daemon: what ends the process does not wait for a step.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, *pairs: tuple[Request, Listener]) -> list[Job]:
        """As `Engine.submit`."""
        jobs = self.engine.submit(*pairs)
        self._work.set()
        return jobs

    def close(self) -> None:
        """Ends all requests between two steps, and the thread; does not wait for it."""
        self.engine.close()
        self._work.set()

    def join(self, seconds: float) -> bool:
        """Waits for the thread's end; returns whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self.engine.closed or self.engine.num_jobs:
            if not self.engine.num_jobs:
                self._work.wait()
                self._work.clear()
                continue
            try:
                self.engine.step()
            except Exception:  # its requests have been told, and others may come
                logging.exception("a step failed, and with it all requests of that moment")
