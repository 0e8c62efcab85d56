"""Claims: which process makes what, on one machine or on several that share a directory.

A claim is a lock on a file, which the system takes back when the process ends, however it ends.
"""

import contextlib
import errno
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

from gptvq_jax.files import durable

_TAKEN = (errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process alone holds a claim, until the context ends; it is not waited for.

    Args:
      path: of the file that stands for it, which stays.

    Raises:
      ValueError: the filesystem has no locks.
    """
    durable.make_directory(path.parent)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise ValueError(
                    f"{path} cannot be locked ({error.strerror}); put the sweep on a filesystem "
                    "that has locks, with --workdir"
                ) from error
            yield False
        else:
            yield True


@contextlib.contextmanager
def waiting(path: Path, poll: float = 0.05) -> Iterator[None]:
    """Holds a claim that nobody holds for long, as soon as it is free.

    Args:
      path: as for `claim`.
      poll: seconds between two looks.
    """
    while True:
        with claim(path) as held:
            if held:
                yield
                return
        time.sleep(poll)
