"""Several processes that share a directory: one of them writes.

All run the same program on the same files. What is on the disk changes only while every process is
at the same write, so that whatever they look up between two writes is the same for all. One process
alone is the writer, and waits for nobody.
"""

from collections.abc import Callable


class _Group:
    """This process among those that share its directories."""

    def __init__(self) -> None:
        self.index, self.count = 0, 1
        self.wait: Callable[[], None] = lambda: None
        self.alone = False  # while the writer does what the others wait for


_group = _Group()


def join(index: int, count: int, wait: Callable[[], None]) -> None:
    """From here on this process is one of several.

    Args:
      index: of this process; 0 writes.
      count: of processes.
      wait: returns once all of them have called it.
    """
    _group.index, _group.count, _group.wait = index, count, wait


def index() -> int:
    """Of this process."""
    return _group.index


def count() -> int:
    """Of processes that share their directories."""
    return _group.count


def writes() -> bool:
    """Whether this process is the one that writes."""
    return _group.index == 0


def meet() -> None:
    """Waits for the other processes, which come to the same place."""
    if not _group.alone:
        _group.wait()


def by_writer(action: Callable[[], None]) -> None:
    """Lets the writer do something while the others wait; what it does meets nobody."""
    if _group.count == 1 or _group.alone:
        action()
        return
    meet()
    if writes():
        _group.alone = True
        try:
            action()
        finally:
            _group.alone = False
    meet()
