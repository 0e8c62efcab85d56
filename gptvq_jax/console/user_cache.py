"""Where things go that are made once per machine: compiled kernels and compiled programs."""

import os
from pathlib import Path

VARIABLE = "XDG_CACHE_HOME"


def user_cache(name: str) -> Path:
    """A directory of this package in the user's cache, made if missing.

    Args:
      name: of the directory.

    Raises:
      OSError: there is no home, or nothing can be written there; the message names the variable
        that moves the cache.
    """
    # The XDG base directory specification: a relative path, like an empty one, does not count.
    base = Path(os.environ.get(VARIABLE, ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError:  # no $HOME, and a user id that the system does not know
            raise OSError(f"there is no home directory for a cache; {_FIX}") from None
    if not base.is_absolute():
        raise OSError(f"the home directory {base.parent} is not an absolute path; {_FIX}")
    path = base / "gptvq_jax" / name
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"the cache {path} cannot be made ({error.strerror}); {_FIX}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise OSError(f"the cache {path} cannot be written; {_FIX}")
    return path


_FIX = f"set {VARIABLE} to a directory that can be written"
