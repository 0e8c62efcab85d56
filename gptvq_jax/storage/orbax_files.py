"""Arrays in Orbax's files: in directories of any name, in silence where that fails."""

import contextlib
import errno
import functools
import gc
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from gptvq_jax.console.errors import first_line
from gptvq_jax.files.disk_space import is_full

_ODD = frozenset("[*?\\")  # characters of a path that Orbax takes for something else
# For which what is under way when Orbax gives up is waited for, so that it says nothing.
_LATE_SECONDS = 0.1
_LATE_THREADS_SECONDS = 2.0

Tree = dict[str, Any]


class OrbaxError(ValueError):
    """Files that Orbax cannot read or write, in one line."""


def save(path: Path, arrays: Tree) -> None:
    """Writes a nested dict of host arrays to a new directory, in one that exists.

    Of several processes that share it all call this, with the same arrays, and one writes.

    Raises:
      OSError: the disk is full.
      OrbaxError: the files cannot be written.
    """
    _call(lambda plain: ocp.save(plain, arrays), path, contextlib.nullcontext())


def describe(path: Path) -> Tree:
    """The nested dict with Orbax's description in place of each array, which has shape and dtype.

    Raises:
      OrbaxError: the files are damaged.
    """
    found = _call(lambda plain: ocp.metadata(plain).metadata, path)
    if not isinstance(found, dict):  # it swallows some errors
        raise OrbaxError("Orbax: it cannot describe the arrays")
    return found


def load(path: Path) -> Tree:
    """The nested dict of host arrays.

    Raises:
      OrbaxError: the files are damaged.
    """
    found = _call(ocp.load, path)
    if not isinstance(found, dict):
        raise OrbaxError(f"Orbax: it finds a {type(found).__name__}")
    return found


def _call(
    job: Callable[[Path], Any],
    path: Path,
    processes: contextlib.AbstractContextManager | None = None,
) -> Any:
    """job(path), of which a failure is one line and nothing else.

    Orbax logs what it cannot parse, its threads print the errors that it raises in the caller too,
    and what is still under way when it gives up prints tracebacks of its own.
    """
    with _plain_path(path.parent) as plain, _silence(), processes or _alone():
        _ignore_late_work()
        before = set(threading.enumerate())
        try:
            return job(plain / path.name)
        except Exception as error:  # it raises what it happens to, also KeyError
            full, reason = is_full(error), first_line(error)[:500]
        deadline = time.monotonic() + _LATE_THREADS_SECONDS
        for thread in set(threading.enumerate()) - before:
            thread.join(max(0, deadline - time.monotonic()))
        time.sleep(_LATE_SECONDS)
        gc.collect()  # a task whose error nobody took logs it then
    if full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    raise OrbaxError(f"Orbax: {reason}")


@functools.cache
def _ignore_late_work() -> None:
    """From now on: what ends after Orbax gave up has nobody to tell, which is no error."""
    hook = sys.unraisablehook

    def filtered(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = filtered
    # Tasks whose error nobody took log it when they are collected, some when Python ends.
    asyncio_log = logging.getLogger("asyncio")
    asyncio_log.addFilter(lambda record: "was never retrieved" not in record.getMessage())


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing is logged, and no thread prints a traceback of what it raises."""
    disabled, before = logging.root.manager.disable, threading.excepthook
    logging.disable(logging.ERROR)
    threading.excepthook = lambda args: None
    try:
        yield
    finally:
        threading.excepthook = before
        logging.disable(disabled)


def _alone() -> contextlib.AbstractContextManager:
    """Orbax reads without waiting for other processes, in whichever thread and order they do."""
    if jax.process_count() == 1:
        return contextlib.nullcontext()
    here = jax.process_index()
    return ocp.Context(
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process{here}"
        )
    )


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
