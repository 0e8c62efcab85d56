"""What work directories of runs and of sweeps hold, as cells of one form.

A run's directory has metrics.jsonl (run/workdir.py). A sweep's has sweep.json, results.jsonl and,
where its cells are runs, a work directory for each.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptvq_jax.config import flat
from gptvq_jax.console.errors import brief, printable
from gptvq_jax.console.json_file import leaves_directory, read_json_lines, read_json_object
from gptvq_jax.study.report.rows import check_result, check_row

RESULTS, SWEEP, METRICS = "results.jsonl", "sweep.json", "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run, or a cell of a sweep.

    Attributes:
      name: no other cell of a report has it.
      directory: where it wrote.
      status: "done", "failed" or "not finished".
      error: of a failed one.
      command: that makes it; "" if it was not noted.
      point: {axis of the sweep: name of the point on it}.
      settings: {dotted field of the config: value}; of a cell without a config, the sweep's and
        those of its axes.
      summary: of a finished one, see run/job.py; of a sweep over layers, bits and errors alone.
      layers: rows of layers; those of a sweep over layers have no block.
      blocks: rows of tuned blocks.
      outer: rows of the embedding and the head, where a recipe has rules for them.
      tuning: rows of the steps that tuned the whole model, and of looks at windows held out.
      recoded: rows of the times that its codes were chosen again.
      moved: rows of what each of its parameters moved.
    """

    name: str
    directory: Path
    status: str
    error: str = ""
    command: str = ""
    point: dict[str, str] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    layers: Sequence[dict[str, Any]] = ()
    blocks: Sequence[dict[str, Any]] = ()
    outer: Sequence[dict[str, Any]] = ()
    tuning: Sequence[dict[str, Any]] = ()
    recoded: Sequence[dict[str, Any]] = ()
    moved: Sequence[dict[str, Any]] = ()

    def number(self, name: str) -> float | None:
        """A number of the summary; of its comparison with the float model where that has it."""
        compared = self.summary.get("comparison", {}).get(name)
        value = self.summary.get(name) if compared is None else compared["value"]
        return None if value is None else float(value)

    def standard_error(self, name: str) -> float | None:
        """Of a number of the comparison, where it is known."""
        value = self.summary.get("comparison", {}).get(name, {}).get("standard_error")
        return None if value is None else float(value)


def named(cells: Sequence[Cell]) -> str:
    """Names for a line about cells, the first few where there are many."""
    names = [cell.name for cell in cells]
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    return ", ".join(names[:3] if more else names) + more


class Results(NamedTuple):
    """All cells, and the lines that say what is missing."""

    cells: list[Cell]
    notes: list[str]


def read_results(directories: Sequence[Path]) -> Results:
    """Reads runs and sweeps.

    Raises:
      ValueError, FileNotFoundError: a directory is neither, a file is damaged, or nothing is
        finished in any of them.
    """
    cells, notes = [], []
    for directory in directories:
        if (directory / SWEEP).is_file():
            more = _sweep(directory, notes)
        elif (directory / METRICS).is_file() or (directory / "config.json").is_file():
            more = [_run(directory)]
        else:
            raise ValueError(
                f"{directory} is neither the work directory of a run nor of a sweep: it has no "
                f"{METRICS} and no {SWEEP}; pass another --workdir"
            )
        if len(directories) > 1 and len(more) > 1:
            more = [dataclasses.replace(c, name=f"{directory.name}/{c.name}") for c in more]
        cells += more
    if not any(cell.layers or cell.summary for cell in cells):
        names = ", ".join(str(directory) for directory in directories)
        failed = next((cell for cell in cells if cell.error), None)
        why = f" ({failed.name} failed: {failed.error})" if failed else ""
        raise ValueError(
            f"nothing is finished in {names} yet{why}; give the command that began it again"
        )
    cells = _with_names_of_their_own(cells)
    return Results(cells, notes + _unfinished(cells))


def _unfinished(cells: Sequence[Cell]) -> list[str]:
    """A line for all cells that are not finished, and one for all that failed in one way."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if cell.status != "done":
            groups.setdefault((cell.status, cell.error), []).append(cell)
    lines = []
    for (status, error), found in groups.items():
        verb = "is not finished" if len(found) == 1 else "are not finished"
        verb = "failed" if status == "failed" else verb
        why = f" ({error})" if error else ""
        if len(cells) == 1:
            lines.append(f"{found[0].name} {verb}: what it lacks is left out{why}")
        else:
            lines.append(f"{len(found)} of {len(cells)} cells {verb}: {named(found)}{why}")
    return lines


def _run(directory: Path, name: str = "") -> Cell:
    """A work directory of a run, finished or not."""
    path = directory / METRICS
    rows = read_json_lines(path) if path.is_file() else []
    for number, row in enumerate(rows, 1):
        check_row(row, f"{path}, line {number}")
    kinds = {
        kind: [row for row in rows if row["kind"] == kind]
        for kind in ("layer", "block", "outer", "tune", "codes", "moved")
    }
    summary = next((row for row in rows if row["kind"] == "summary"), {})
    config, command = directory / "config.json", directory / "command.txt"
    return Cell(
        name=printable(name or directory.absolute().name),
        directory=directory,
        status="done" if summary else "not finished",
        command=command.read_text(errors="replace").strip() if command.is_file() else "",
        settings=flat(read_json_object(config)) if config.is_file() else {},
        summary=summary,
        layers=kinds["layer"],
        blocks=kinds["block"],
        outer=kinds["outer"],
        tuning=kinds["tune"],
        recoded=kinds["codes"],
        moved=kinds["moved"],
    )


def _sweep(directory: Path, notes: list[str]) -> list[Cell]:
    """The cells of a sweep, in its order."""
    path = directory / SWEEP
    sweep = read_json_object(path)
    listed = sweep.get("cells")
    if not isinstance(listed, list) or not all(isinstance(cell, dict) for cell in listed):
        raise ValueError(f"{path} lists no cells; restore the file, or pass another --workdir")
    results, rows = directory / RESULTS, {}
    for number, row in enumerate(read_json_lines(results) if results.is_file() else [], 1):
        check_result(row, sweep.get("kind"), f"{results}, line {number}")
        rows[row["cell"]] = row  # a cell that was run again has the last word
    refusals = sweep.get("refused", [])
    for refused in refusals if isinstance(refusals, list) else []:
        if not isinstance(refused, dict):
            raise ValueError(f"{path} has a refused cell without a name; restore the file")
        notes.append(printable(f"{refused.get('name')} was refused: {refused.get('reason')}"))
    base = sweep.get("base") or {}
    if not isinstance(base, dict):
        raise ValueError(f"{path}: base={brief(base)} is no object; restore the file")
    return [_cell(directory, path, flat(base), c, rows.get(c.get("name"))) for c in listed]


def _cell(
    directory: Path,
    path: Path,
    base: dict[str, Any],
    cell: dict[str, Any],
    row: dict[str, Any] | None,
) -> Cell:
    name, work = cell.get("name"), cell.get("workdir") or "."
    if not isinstance(name, str) or not isinstance(work, str) or leaves_directory(work):
        raise ValueError(f"{path} has a cell without a name or a directory in it; restore the file")
    for part in ("point", "fields"):
        if not isinstance(cell.get(part) or {}, dict):
            raise ValueError(f"{path}: {part} of cell {name!r} is no object; restore the file")
    work_directory = directory / work
    run = Cell(printable(name), work_directory, "not finished")
    if work != "." and (work_directory / METRICS).is_file():
        run = _run(work_directory, name)
    found = row or {}
    return dataclasses.replace(
        run,
        status=found.get("status", run.status),
        error=printable(str(found.get("error") or "")),
        command=str(cell.get("command") or run.command),
        point={str(k): str(v) for k, v in (cell.get("point") or {}).items()},
        settings=run.settings or {**base, **(cell.get("fields") or {})},
        summary=found if found.get("status") == "done" else run.summary,
        layers=run.layers or found.get("layers", ()),
    )


def _with_names_of_their_own(cells: list[Cell]) -> list[Cell]:
    """Cells of the same name get their directory for it."""
    names = [cell.name for cell in cells]
    twice = {name for name in names if names.count(name) > 1}
    return [
        dataclasses.replace(cell, name=printable(str(cell.directory)))
        if cell.name in twice
        else cell
        for cell in cells
    ]
