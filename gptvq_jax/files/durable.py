"""Files that are there whole or not at all, after a kill, a full disk or a power loss.

A file is written under another name; its content goes to the disk before its name does, and the
name before anything that counts on it. Where several processes share the directory (sharing.py),
one of them writes, while all are at the same write.
"""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptvq_jax.files import sharing
from gptvq_jax.files.disk_space import naming_full_disk


@contextlib.contextmanager
def replacing(path: Path, num_bytes: int = 0) -> Iterator[Path]:
    """Yields PATH.partial to write, which gets its name when the block ends without an error.

    Otherwise it disappears, and `path` stays as it was.

    Args:
      path: of a file; its directory is made.
      num_bytes: its size, for the message of a full disk.

    Raises:
      FullDiskError: the disk is full.
    """
    if not sharing.writes():  # what another process writes is written here too, and forgotten
        with tempfile.TemporaryDirectory(prefix="gptvq-") as scratch:
            yield Path(scratch) / path.name
        sharing.meet()
        sharing.meet()
        return
    partial = path.with_name(f"{path.name}.partial")
    try:
        with naming_full_disk(path, num_bytes):
            make_directory(path.parent)
            yield partial
            sync(partial)
            sharing.meet()
            rename(partial, path)
            sharing.meet()
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replaces a file.

    Raises:
      FullDiskError: the disk is full.
    """
    with replacing(Path(path), len(text)) as partial:
        partial.write_text(text, encoding="utf-8")


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds JSON objects to a file, one per line: all of them or, on a full disk, none.

    Raises:
      FullDiskError: the disk is full.
    """
    text = "".join(json.dumps(row) + "\n" for row in rows)
    sharing.by_writer(lambda: _append(path, text))


def _append(path: Path, text: str) -> None:
    with naming_full_disk(path, len(text)), open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(text.encode()) < len(text.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), before)
            raise


def drop_partial(directory: Path) -> None:
    """Removes what a killed process was writing in a directory."""

    def drop() -> None:
        for path in directory.glob("*.partial"):
            path.unlink()

    sharing.by_writer(drop)


def make_directory(path: Path) -> None:
    """Makes a directory and its parents, unless they exist."""
    if path.is_dir():
        return
    try:
        path.mkdir()
    except FileNotFoundError:
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
    sync(path.parent)


def rename(old: Path, new: Path) -> None:
    """Renames what is on the disk already (`sync`, `sync_tree`), and sees the name there."""
    os.replace(old, new)
    sync(new.parent)


def sync_tree(directory: Path) -> None:
    """Sees everything in a directory on the disk, and then its own name."""
    for path, _, files in os.walk(directory, topdown=False):
        for name in files:
            sync(Path(path) / name)
        sync(Path(path))
    sync(directory.parent)


def sync(path: Path) -> None:
    """Sees a file's content on the disk, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network filesystems know no such thing for directories.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
