"""The arrays of a stored tree: Orbax's files below arrays/, which may be anyone's.

Nothing is allocated before the files are known to be what the tree's description says.
"""

import contextlib
import functools
import gc
import hashlib
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from gptvq_jax.check_tensor import signature
from gptvq_jax.errors import brief, first_line
from gptvq_jax.tree_record import RECORD, Record, arrays_of

# Bytes of arrays for each byte that is stored, beyond those that any tree may have: Orbax does
# compress, but no real weights so far.
_MAX_RATIO, _FREE_BYTES = 1024, 2**26
# For which reads that are under way when Orbax gives up are waited for, so that they say nothing.
_LATE_SECONDS = 0.1
_ODD = frozenset("[*?\\")  # characters of a path that Orbax takes for something else

Tree = dict[str, Any]


class DamagedError(ValueError):
    """What is stored is not what was written."""


def write_arrays(directory: Path, arrays: Tree) -> None:
    """Writes a nested dict of host arrays below `directory`, which exists."""
    with plain_path(directory) as plain:
        ocp.save(plain / "arrays", arrays)


def read_arrays(directory: Path, record: Record) -> Tree:
    """The nested dict of host arrays, once their own description agrees with the record.

    Raises:
      DamagedError: it does not, or the files cannot be read.
    """
    path, expected = directory / "arrays", arrays_of(record)
    stored_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    metas = (record["quantized"] | record["dense"]).values()
    num_bytes = sum(meta["num_bytes"] for meta in metas)
    if num_bytes > _FREE_BYTES + _MAX_RATIO * stored_bytes:
        raise damaged(
            directory, RECORD, f"{stored_bytes} bytes cannot hold {num_bytes} bytes of arrays"
        )
    with plain_path(directory) as plain:
        described = _orbax(directory, _description, plain / "arrays")
        _check_arrays(directory, described, expected)
        arrays = _orbax(directory, _contents, plain / "arrays")
    _check_arrays(directory, arrays, expected)
    return arrays


def check_files(directory: Path, record: Record) -> None:
    """Raises DamagedError unless the files are those whose sums are recorded.

    It comes before Orbax reads them, which says much of a damaged file and names no block.
    """
    for path in (directory / "arrays").rglob("*"):
        # A pipe would be waited for; sums leave out what lies behind the link of a directory. Links
        # of files are followed: the cache of the Hugging Face hub is made of them.
        if not path.is_file() and (path.is_symlink() or not path.is_dir()):
            raise damaged(directory, str(path.relative_to(directory)), "neither file nor folder")
    found = file_sums(directory)
    for path, sha256 in record["files"].items():
        if found.get(path) != sha256:
            raise damaged(directory, path, "changed or truncated" if path in found else "missing")


def file_sums(directory: Path) -> dict[str, str]:
    """{path below `directory`: SHA-256} of Orbax's files."""
    sums = {}
    for path in sorted(path for path in (directory / "arrays").rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            sums[str(path.relative_to(directory))] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def damaged(directory: Path, name: str, why: str) -> DamagedError:
    """An error that says what is wrong with `name` in a stored tree."""
    return DamagedError(
        f"{directory} is damaged at {name}: {why}; restore it from a copy, or quantize again in "
        "another --workdir"
    )


def _check_arrays(directory: Path, arrays: Tree, expected: dict[tuple[str, ...], str]) -> None:
    """Compares a nested dict of arrays, or of what Orbax says of them, with `arrays_of`."""
    found = traverse_util.flatten_dict(arrays)
    for keys in sorted(expected):
        name, array = "/".join(keys), found.pop(keys, None)
        if array is None:  # of a quantized layer, or all of a dense one
            raise damaged(directory, "/".join(keys[:-1]), f"missing: {keys[-1]}")
        stored = signature(array) if hasattr(array, "shape") else type(array).__name__
        if stored != expected[keys]:
            raise damaged(directory, name, f"it is stored as {stored}, not as {expected[keys]}")
        chunk = getattr(getattr(array, "storage_metadata", None), "chunk_shape", None) or ()
        if any(part > size for part, size in zip(chunk, array.shape, strict=False)):
            # Each would be allocated whole.
            raise damaged(directory, name, f"it is stored in chunks of {chunk}")
    if found:
        unknown = brief("/".join(map(str, next(iter(found)))))
        raise damaged(directory, unknown, "it is not in the record")


def _description(path: Path) -> Tree:
    found = ocp.metadata(path).metadata
    if not isinstance(found, dict):  # it swallows some errors
        raise ValueError("it cannot describe the arrays")
    return found


def _contents(path: Path) -> Tree:
    found = ocp.load(path)
    if not isinstance(found, dict):
        raise ValueError(f"it finds a {type(found).__name__}")
    return found


def _orbax(directory: Path, read: Callable[[Path], Any], path: Path) -> Any:
    """read(path), of which a failure is one line and nothing else.

    On damaged files Orbax logs what it cannot parse, and reads that are still under way when it
    gives up print tracebacks of their own.
    """
    with _no_logs():
        _ignore_late_reads()
        try:
            return read(path)
        except Exception as error:  # it raises what it happens to, also KeyError
            reason = first_line(error)[:500]
        time.sleep(_LATE_SECONDS)
        gc.collect()  # a task whose error nobody took logs it then
    raise damaged(directory, "arrays", f"Orbax: {reason}")


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
def plain_path(directory: Path) -> Iterator[Path]:
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
