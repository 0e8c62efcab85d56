"""Room on the disk: what a pass needs is compared with what is free, and a full disk is named."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Rust and C++ libraries put it in words, in exceptions of their own.
_WORDS = ("No space left on device", "Disk quota exceeded")


class FullDiskError(OSError):
    """Names a path that needs more room than there is."""


def check_room(path: str | os.PathLike, num_bytes: int) -> None:
    """Checks that a disk has room, before anything is written to it.

    Args:
      path: what will be written, for the message; it need not exist.
      num_bytes: that it will take beyond what is on the disk now.

    Raises:
      FullDiskError: there is less.
    """
    if num_bytes > _free(path):
        raise _full(path, num_bytes)


@contextlib.contextmanager
def naming_full_disk(path: str | os.PathLike, num_bytes: int = 0) -> Iterator[None]:
    """Turns what any library raises on a full disk into a FullDiskError.

    Args:
      path: that is written in the context.
      num_bytes: its size, if it is known.
    """
    try:
        yield
    except FullDiskError:
        raise
    except Exception as error:
        if is_full(error):
            raise _full(path, num_bytes) from error
        raise


def is_full(error: BaseException) -> bool:
    """Whether an exception of any library says that a disk is full."""
    return getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _WORDS)


def directory_bytes(path: Path, pattern: str = "**/*") -> int:
    """Of all files below a directory whose path from there matches."""
    return sum(file.stat().st_size for file in path.glob(pattern) if file.is_file())


def _free(path: str | os.PathLike) -> int:
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _full(path: str | os.PathLike, num_bytes: int) -> FullDiskError:
    needs = f"needs {size_text(num_bytes)} more" if num_bytes else "needs more room"
    return FullDiskError(
        errno.ENOSPC,
        f"No space left on device: {path} {needs}, and {size_text(_free(path))} are free; make "
        "room and give the same command again",
    )


def size_text(num_bytes: int) -> str:
    """In GB, 10^9 bytes."""
    return f"{num_bytes / 1e9:.{2 if num_bytes >= 1e8 else 6}f} GB"
