"""The arrays of a stored tree: Orbax's files below arrays/, which may be anyone's.

Nothing is allocated before the files are known to be what the tree's description says.
"""

import hashlib
from pathlib import Path

from flax import traverse_util

from gptvq_jax.console.errors import brief
from gptvq_jax.core.check_tensor import signature
from gptvq_jax.storage import orbax_files
from gptvq_jax.storage.orbax_files import Tree
from gptvq_jax.storage.tree_record import ARRAYS, RECORD, Record, arrays_of

# Bytes of arrays for each byte that is stored, beyond those that any tree may have: Orbax does
# compress, but no real weights so far.
_MAX_RATIO, _FREE_BYTES = 1024, 2**26


class DamagedError(ValueError):
    """What is stored is not what was written."""


def read_arrays(directory: Path, record: Record) -> Tree:
    """The nested dict of host arrays, once their own description agrees with the record.

    Raises:
      DamagedError: it does not, or the files cannot be read.
    """
    path, expected = directory / ARRAYS, arrays_of(record)
    stored_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    metas = (record["quantized"] | record["dense"]).values()
    num_bytes = sum(meta["num_bytes"] for meta in metas)
    if num_bytes > _FREE_BYTES + _MAX_RATIO * stored_bytes:
        raise damaged(
            directory, RECORD, f"{stored_bytes} bytes cannot hold {num_bytes} bytes of arrays"
        )
    try:
        _check_arrays(directory, orbax_files.describe(path), expected)
        arrays = orbax_files.load(path)
    except orbax_files.OrbaxError as error:
        raise damaged(directory, "arrays", str(error)) from None
    _check_arrays(directory, arrays, expected)
    return arrays


def check_files(directory: Path, record: Record) -> None:
    """Raises DamagedError unless the files are those whose sums are recorded.

    It comes before Orbax reads them, which says much of a damaged file and names no block.
    """
    for path in (directory / ARRAYS).rglob("*"):
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
    for path in sorted(path for path in (directory / ARRAYS).rglob("*") if path.is_file()):
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
