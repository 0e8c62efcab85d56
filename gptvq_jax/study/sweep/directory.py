"""The directory of a sweep:

    sweep.json      the axes, the cells with the command of each, and what was refused
    results.jsonl   a line for every cell that is finished or has failed
    results.csv     the same
    cells/NAME/     what a cell wrote; for kind "models" an ordinary work directory of a run
    shared/NAME/    what several cells need, made once
    claims/         locks

One sweep has it; what another config would make of it is refused.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gptvq_jax.config import difference, from_config, to_dict
from gptvq_jax.console.json_file import read_json_object
from gptvq_jax.console.report import json_numbers
from gptvq_jax.files import durable
from gptvq_jax.files.disk_space import FullDiskError, naming_full_disk
from gptvq_jax.study.sweep.cells import Sweep
from gptvq_jax.study.sweep.claims import claim, waiting
from gptvq_jax.study.sweep.commands import command

_FILE = "sweep.json"


class Directory:
    """Where a sweep is, and its claims."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def cell(self, name: str) -> Path:
        return self.path / "cells" / name

    def shared(self, name: str) -> Path:
        return self.path / "shared" / name

    def claim(self, name: str):
        """See `claims.claim`."""
        return claim(self.path / "claims" / name)

    def waiting(self, name: str):
        """See `claims.waiting`."""
        return waiting(self.path / "claims" / name)

    def open(self, record: dict[str, Any]) -> None:
        """Makes it the directory of a sweep, or sees that it is already.

        Args:
          record: of the sweep, from `record_of`.

        Raises:
          ValueError: it belongs to another sweep or to something else, or cannot be written.
          FullDiskError: there is no room for anything.
        """
        self.check(record)
        try:
            with naming_full_disk(self.path):
                durable.make_directory(self.path)
                with self.waiting("sweep"):
                    self.check(record)  # another process may have made it just now
                    if not self._file.exists() or _load(self._file) != record:
                        durable.write_text(self._file, json.dumps(record, indent=1) + "\n")
        except FullDiskError:
            raise
        except OSError as error:
            raise ValueError(
                f"cannot write to {self.path} ({error.strerror}); pass another --workdir"
            ) from error

    def check(self, record: dict[str, Any]) -> None:
        """Sees whether a sweep may have this directory; nothing is written."""
        if not self._file.exists():
            others = ("config.json", "checkpoint", "manifest.json", "cells", "shared")
            others += ("metrics.jsonl",)
            there = next((name for name in others if (self.path / name).exists()), None)
            if there is not None:
                raise ValueError(
                    f"{self.path} holds {there} and no {_FILE}: it is no directory of a sweep; "
                    "pass another --workdir"
                )
            return
        old = _load(self._file)
        names = ({name: of[name] for name in ("name", "kind")} for of in (old, record))
        changed = difference(*names) or difference(_identity(old), _identity(record))
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ValueError(
                f"{self.path} is the directory of another sweep: {'; '.join(changed[:3])}{more}. "
                "Restore the config to go on, or pass another --workdir"
            )

    @property
    def _file(self) -> Path:
        return self.path / _FILE


def record_of(sweep: Sweep, origin: str, given: Collection[str] = ()) -> dict[str, Any]:
    """What sweep.json holds.

    Args:
      sweep: resolved.
      origin: its config file, with the argument.
      given: fields of that which the command line named.
    """
    record = {
        "name": sweep.name,
        "kind": sweep.kind,
        "axes": [{"name": a.name, "points": [p.name for p in a.points]} for a in sweep.axes],
        "cells": [
            {
                "name": cell.name,
                "point": cell.point,
                "fields": cell.fields,
                "workdir": f"cells/{cell.name}",
                "command": command(sweep, cell, origin, given),
            }
            for cell in sweep.cells
        ],
        "refused": [refused._asdict() for refused in sweep.refused],
        "base": to_dict(from_config(sweep.base)),
    }
    return json.loads(json.dumps(json_numbers(record)))


def _load(path: Path) -> dict[str, Any]:
    """A sweep.json; raises ValueError in one line where it is something else."""
    try:
        record = read_json_object(path)
        _identity(record)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not the record of a sweep ({error!r} is missing); restore it, or pass "
            "another --workdir"
        ) from error
    return record


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    """What makes two sweeps the same: what their cells are."""
    cells = {cell["name"]: cell["fields"] for cell in record["cells"]}
    axes = {axis["name"]: axis["points"] for axis in record["axes"]}
    names = {name: record[name] for name in ("name", "kind", "base")}
    return {**names, "axes": axes, "cells": cells}
