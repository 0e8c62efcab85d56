"""Reading a JSON file that anyone may have written: one object, or one line that says why not."""

import json
import math
from collections import Counter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from gptvq_jax.errors import brief, first_line

MAX_BYTES = 2**26  # of one file; what describes the largest models takes a few MiB


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a file holds.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not one JSON object, a name occurs twice in one of its objects, a number is
        not finite, or it is nested too deep or too large; the caller names the file.
    """
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"no such file: {path}")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    try:
        value = json.loads(
            content,
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        raise ValueError(first_line(error)) from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds {brief(value)}, not an object")
    return value


def leaves_directory(path: str) -> bool:
    """Whether a relative path that a file names may lead out of its directory, on any system."""
    flavours = (PurePosixPath(path), PureWindowsPath(path))
    return any(p.anchor or ".." in p.parts or "\0" in path for p in flavours)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{brief(twice)} occurs twice in an object")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{brief(text)} is not a finite number")
    return value
