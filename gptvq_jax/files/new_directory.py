"""A directory that is there whole or not at all, and that one process at a time writes."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gptvq_jax.files import durable
from gptvq_jax.files.disk_space import FullDiskError, check_room, naming_full_disk

_OURS = (".partial", ".lock")


@contextlib.contextmanager
def new_directory(path: str | os.PathLike, num_bytes: int = 0) -> Iterator[Path]:
    """Yields a directory to fill, which gets its name `path` when the block ends without an error.

    Until then it is called PATH.partial; one that a killed process left is emptied. Beside it lies
    PATH.lock, which the system unlocks when the process ends, however it ends.

    Args:
      path: new or empty directory.
      num_bytes: that it will hold, if known.

    Raises:
      ValueError: `path` is in use or cannot be written, or another process is writing it.
      FullDiskError: there is no room for it.
    """
    path = Path(path).resolve()  # one place and one lock, however it is spelled
    _check_unused(path)
    partial = path.with_name(f"{path.name}.partial")
    with contextlib.ExitStack() as held:
        try:
            with naming_full_disk(path, num_bytes):
                path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(path))
                _check_unused(path)  # another process may have finished it just now
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
        except FullDiskError:
            raise
        except OSError as error:
            raise ValueError(
                f"cannot write to {path.parent}: {error.strerror}; choose another directory"
            ) from error
        try:
            check_room(path, num_bytes)
            with naming_full_disk(path, num_bytes):
                yield partial
                durable.sync_tree(partial)
                durable.rename(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _check_unused(path: Path) -> None:
    if path.suffix in _OURS:  # a writer of the name without it would remove it
        raise ValueError(
            f"{path} ends in {path.suffix}, as what is unfinished does; choose another"
        )
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty directory; choose another")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds PATH.lock and removes it at the end; one that a killed process left is taken over."""
    file = path.with_name(f"{path.name}.lock")
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_open(file, descriptor):
                break
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(
                f"another process is writing {path}; wait for it or choose another directory"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a file that its owner removed before we had the lock
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _is_open(file: Path, descriptor: int) -> bool:
    """Whether the file that is open is still the one under that name."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False
