"""A line for what takes long without a sign of life, such as compilation."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

_SECONDS = 2.0


@contextlib.contextmanager
def late_note(text: str, seconds: float = _SECONDS) -> Iterator[Callable[[], None]]:
    """Prints a line on standard error once the block has taken some time.

    Args:
      text: the line.
      seconds: before it is printed.

    Yields:
      A function that says that the block has shown a sign of life: no line comes after it.
    """
    timer = threading.Timer(seconds, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True  # Ctrl-C waits for no thread
    timer.start()
    try:
        yield timer.cancel
    finally:
        timer.cancel()
