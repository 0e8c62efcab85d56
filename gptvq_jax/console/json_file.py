"""Reading JSON files that anyone may have written: objects, or one line that says why not."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from gptvq_jax.console.errors import brief, first_line

MAX_BYTES = 2**26  # of one file; what describes the largest models takes a few MiB


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that somebody's file holds.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not JSON, too deep or large, or something else than an object; the message
        names the file.
    """
    try:
        value = _load(path)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {brief(value)}, not a JSON object with named fields")
    return value


def read_own_object(path: Path) -> dict[str, Any]:
    """The object that a file of this package holds, which never has more than it needs.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: as `read_json_object`, or a name occurs twice in one of its objects, or a number
        is not finite; the caller names the file.
    """
    value = _load(path, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    if not isinstance(value, dict):
        raise ValueError(f"it holds {brief(value)}, not an object with named fields")
    return value


def _load(path: Path, **hooks: Callable) -> Any:
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"no such file: {path}")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    try:
        return json.loads(content, **hooks)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        raise ValueError(first_line(error)) from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, one a line.

    A last line that breaks off is what a process writes, or wrote when it was killed: it is left
    out.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: another line is no JSON object; the message names the file and the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    unfinished = lines.pop()
    rows = []
    for number, line in enumerate([*lines, unfinished] if unfinished else lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"it holds {brief(row)}")
        except (ValueError, RecursionError) as error:
            if number > len(lines):
                break
            raise ValueError(
                f"{path} is damaged: line {number} is no JSON object ({first_line(error)}); "
                "restore the file"
            ) from None
        rows.append(row)
    return rows


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
