"""results.jsonl and results.csv: a row for every cell that is finished or has failed.

Both are written anew, whole, whenever a cell ends, by the process that it ends in.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from gptvq_jax.config import flat
from gptvq_jax.console.report import json_numbers
from gptvq_jax.files import durable
from gptvq_jax.study.sweep.directory import Directory

DONE, FAILED = "done", "failed"
# What the columns start with; the others follow as the rows have them.
_FIRST = ("cell", "status", "bits_per_value", "perplexity_quantized", "sqnr_db", "seconds")


class Results:
    """Of a sweep.

    Args:
      directory: of the sweep.
      order: names of its cells, in the order of their rows.
    """

    def __init__(self, directory: Directory, order: Sequence[str]):
        self._directory, self._order = directory, order
        self._jsonl = directory.path / "results.jsonl"

    def rows(self) -> dict[str, dict[str, Any]]:
        """{cell: its row}; lines that are no rows of this sweep do not count."""
        try:
            lines = self._jsonl.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return {}
        found = {}
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and row.get("cell") in self._order and "status" in row:
                found[row["cell"]] = row
        return {name: found[name] for name in self._order if name in found}

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds the row of a cell, in place of an earlier one."""
        with self._directory.waiting("results"):
            rows = {**self.rows(), row["cell"]: json_numbers(dict(row))}
            kept = [rows[name] for name in self._order if name in rows]
            durable.write_text(self._jsonl.with_suffix(".csv"), as_csv(kept))
            durable.write_text(self._jsonl, "".join(json.dumps(row) + "\n" for row in kept))


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with a column for every number or text of any row; lists are left out."""
    flats = [
        {name: value for name, value in flat(dict(row)).items() if not isinstance(value, list)}
        for row in rows
    ]
    columns = dict.fromkeys(name for row in flats for name in row)
    ordered = [name for name in _FIRST if name in columns]
    ordered += [name for name in columns if name not in ordered]
    out = io.StringIO()
    writer = csv.DictWriter(out, ordered, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flats)
    return out.getvalue()
