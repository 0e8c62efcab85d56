"""Arrays in Orbax's files: in directories of any name, in silence where they are damaged."""

import contextlib
import functools
import gc
import logging
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from gptvq_jax.disk_space import is_full
from gptvq_jax.errors import first_line

_ODD = frozenset("[*?\\")  # characters of a path that Orbax takes for something else
# For which reads that are under way when Orbax gives up are waited for, so that they say nothing.
_LATE_SECONDS = 0.1

Tree = dict[str, Any]


class OrbaxError(ValueError):
    """Files that Orbax cannot read, in one line."""


def save(path: Path, arrays: Tree) -> None:
    """Writes a nested dict of host arrays to a new directory, in one that exists."""
    with _plain_path(path.parent) as plain, _threads_quiet_on_a_full_disk():
        ocp.save(plain / path.name, arrays)


def describe(path: Path) -> Tree:
    """The nested dict with Orbax's description in place of each array, which has shape and dtype.

    Raises:
      OrbaxError: the files are damaged.
    """
    found = _read(lambda plain: ocp.metadata(plain).metadata, path)
    if not isinstance(found, dict):  # it swallows some errors
        raise OrbaxError("Orbax: it cannot describe the arrays")
    return found


def load(path: Path) -> Tree:
    """The nested dict of host arrays.

    Raises:
      OrbaxError: the files are damaged.
    """
    found = _read(ocp.load, path)
    if not isinstance(found, dict):
        raise OrbaxError(f"Orbax: it finds a {type(found).__name__}")
    return found


def _read(read: Callable[[Path], Any], path: Path) -> Any:
    """read(path), of which a failure is one line and nothing else.

    On damaged files Orbax logs what it cannot parse, and reads that are still under way when it
    gives up print tracebacks of their own.
    """
    with _plain_path(path.parent) as plain, _no_logs():
        _ignore_late_reads()
        try:
            return read(plain / path.name)
        except Exception as error:  # it raises what it happens to, also KeyError
            reason = first_line(error)[:500]
        time.sleep(_LATE_SECONDS)
        gc.collect()  # a task whose error nobody took logs it then
    raise OrbaxError(f"Orbax: {reason}")


@functools.cache
def _ignore_late_reads() -> None:
    """From now on: a read that ends after Orbax gave up has nobody to tell, which is no error."""
    hook = sys.unraisablehook

    def filtered(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = filtered


@contextlib.contextmanager
def _no_logs() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _threads_quiet_on_a_full_disk() -> Iterator[None]:
    """Keeps Orbax's threads from printing a traceback of what it raises again in the caller."""
    before = threading.excepthook

    def quiet(args):
        if not is_full(args.exc_value):
            before(args)

    threading.excepthook = quiet
    try:
        yield
    finally:
        threading.excepthook = before


@contextlib.contextmanager
def _plain_path(directory: Path) -> Iterator[Path]:
    """A path to `directory` that Orbax can take, for as long as the context lasts.

    Orbax looks for its files with a glob on their path, and its file driver takes a backslash for a
    slash. Such a directory is reached through a link in the temporary directory.
    """
    if not _ODD & set(str(directory)):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="gptvq-") as scratch:
        if _ODD & set(scratch):
            raise ValueError(
                f"{directory} has one of the characters {' '.join(sorted(_ODD))} in its name, and "
                f"so has the temporary directory {scratch}; set TMPDIR to another one"
            )
        link = Path(scratch) / "directory"
        link.symlink_to(directory.absolute(), target_is_directory=True)
        yield link
