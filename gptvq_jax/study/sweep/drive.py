"""The sweep itself: whatever nobody has made yet is claimed, made, and recorded.

Any number of processes may do this in one directory. Each takes a cell that no other works on, or
a pass that cells share; where there is neither it waits, so that it can take over what a process
that dies leaves.
"""

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter, sleep
from typing import Any, Protocol

from gptvq_jax.console.errors import first_line
from gptvq_jax.console.progress import Progress
from gptvq_jax.files import durable
from gptvq_jax.files.disk_space import FullDiskError
from gptvq_jax.study.sweep.cells import Cell, Sweep
from gptvq_jax.study.sweep.directory import Directory
from gptvq_jax.study.sweep.estimate import Seconds
from gptvq_jax.study.sweep.results import DONE, FAILED, Results
from gptvq_jax.study.sweep.table import Table

_POLL = 0.5  # seconds between two looks at what others do
_USER_ERRORS = (ValueError, OSError, NotImplementedError)  # one line says it all


class Maker(Protocol):
    """How cells of a kind are made: models.Models, layers.Layers."""

    sweep: Sweep

    def passes(self, cell: Cell) -> Sequence[Any]:
        """What a cell needs that others may need too, each with a `name` and a `kind`; in order."""
        ...

    def is_made(self, of: Any) -> bool: ...

    def make(self, of: Any, cell: Cell) -> None: ...

    def forget(self, of: Any) -> None:
        """Removes what a pass has made."""
        ...

    def run(self, cell: Cell) -> dict[str, Any]:
        """Makes a cell; returns what its row has beside what all rows have."""
        ...

    def cell_flop(self, cell: Cell) -> float:
        """Of matrix products and trellis searches, passes that are shared apart."""
        ...

    def pass_flop(self, of: Any, cell: Cell) -> float: ...

    def cell_bytes(self, cell: Cell) -> tuple[int, int]:
        """What a cell leaves on the disk, and what it takes beside while it is made."""
        ...

    def pass_bytes(self, of: Any, cell: Cell) -> int: ...


def choose(cells: Sequence[Cell], pattern: str | None) -> list[Cell]:
    """Those whose name has a match.

    Raises:
      ValueError: the pattern is none, or no name has a match.
    """
    if pattern is None:
        return list(cells)
    try:
        chosen = [cell for cell in cells if re.search(pattern, cell.name)]
    except re.error as error:
        raise ValueError(
            f"--cells={pattern} is no regular expression ({error}); write one for names of cells, "
            "as in --cells='^dim2'"
        ) from None
    if not chosen:
        known = ", ".join(cell.name for cell in cells)
        raise ValueError(f"--cells={pattern} matches none of the cells; those are {known}")
    return chosen


class Drive:
    """Takes the cells of a sweep to their end.

    Args:
      maker: of the cells.
      directory: opened for the sweep.
      record: what sweep.json has of each cell, by its name.
      chosen: cells that are wanted.
      work: of each of the sweep's cells, in any unit, for the ETA.
      table: of the chosen cells.
      time: of what is left, for the ETA before a cell is done here; None: nothing is known.
      poll: seconds between two looks at what other processes do.
      sleep: for as many seconds.
    """

    def __init__(
        self,
        maker: Maker,
        directory: Directory,
        record: dict[str, dict[str, Any]],
        chosen: Sequence[Cell],
        work: dict[str, float],
        table: Table,
        time: Seconds | None = None,
        poll: float = _POLL,
        sleep: Callable[[float], None] = sleep,
    ):
        self._maker, self._directory, self._record = maker, directory, record
        self._chosen, self._work, self._table = list(chosen), work, table
        self._time, self._poll, self._sleep = time, poll, sleep
        names = [cell.name for cell in maker.sweep.cells]
        self._results = Results(directory, names)
        self._broken: dict[str, Exception] = {}  # passes that failed here, and with what
        # What has failed before is tried again: once.
        self._old = {n: row for n, row in self._results.rows().items() if row["status"] == FAILED}

    def run(self) -> list[str]:
        """Makes what is left of the chosen cells; returns the names of those that failed."""
        total = sum(self._work[cell.name] for cell in self._chosen)
        with Progress(len(self._chosen), self._maker.sweep.name, "cell", total) as progress:
            left = self._left(self._chosen, progress.skip)
            if self._time is not None:
                progress.expect(self._time.value, self._time.at_least)
            while left:
                if not self._take(left, progress):
                    progress.wait("waiting for other processes")
                    self._sleep(self._poll)
                left = self._left(left, progress.skip)
        rows = self._results.rows()
        self._forget(rows)
        return [c.name for c in self._chosen if rows[c.name]["status"] == FAILED]

    def _left(self, cells: Sequence[Cell], ended: Callable[..., None]) -> list[Cell]:
        """Cells that nobody has ended; the others are shown and counted."""
        rows, left = self._results.rows(), []
        for cell in cells:
            row = rows.get(cell.name)
            if row is None or row == self._old.get(cell.name):
                left.append(cell)
                continue
            if self._table.ended(cell.name, row):
                ended(1, self._work[cell.name])
        return left

    def _take(self, cells: Sequence[Cell], progress: Progress) -> bool:
        """Makes one thing that nobody else is making: a cell, or a pass on the way to one."""
        for cell in cells:
            missing = [of for of in self._maker.passes(cell) if not self._maker.is_made(of)]
            name = missing[0].name if missing else f"cell-{cell.name}"
            with self._directory.claim(name) as mine:
                if not mine:
                    self._table.elsewhere(cell.name)
                    continue
                if missing:
                    # Another process may have made it just now.
                    if not self._maker.is_made(missing[0]):
                        self._make(missing[0], cell, progress)
                    return True
                if self._left([cell], progress.skip):
                    self._run(cell, progress)
                return True
        return False

    def _make(self, of: Any, cell: Cell, progress: Progress) -> None:
        self._table.started(cell.name, of.kind)
        progress.note(of.name)
        with self._recorded(cell, progress):
            if of.name in self._broken:  # hours may have gone into it
                raise self._broken[of.name]
            try:
                self._maker.make(of, cell)
            except Exception as error:
                self._broken[of.name] = error
                raise

    def _run(self, cell: Cell, progress: Progress) -> None:
        self._table.started(cell.name, "running")
        progress.note(cell.name)
        start = perf_counter()
        with self._recorded(cell, progress):
            fields = self._maker.run(cell)
            seconds = fields.get("seconds", perf_counter() - start)
            self._add(cell, DONE, None, seconds, fields, progress)

    @contextlib.contextmanager
    def _recorded(self, cell: Cell, progress: Progress) -> Iterator[None]:
        """What is raised inside becomes the row of a cell that has failed."""
        start = perf_counter()
        try:
            yield
        except FullDiskError:
            raise  # nothing else would have room either
        except Exception as error:
            text = " ".join(str(error).split())
            if not isinstance(error, _USER_ERRORS):  # a bug, or memory that is not there
                file = self._directory.cell(cell.name) / "error.txt"
                durable.write_text(file, traceback.format_exc())
                text = f"{type(error).__name__}: {first_line(error)} (all of it: {file})"
            self._add(cell, FAILED, text, perf_counter() - start, {}, progress)

    def _add(
        self,
        cell: Cell,
        status: str,
        error: str | None,
        seconds: float,
        fields: dict[str, Any],
        progress: Progress,
    ) -> None:
        record = self._record[cell.name]
        row = {
            "cell": cell.name,
            **{name: record[name] for name in ("point", "fields")},
            **{"status": status, "error": error, "seconds": seconds},
            **{name: record[name] for name in ("command", "workdir")},
        }
        row |= {name: value for name, value in fields.items() if name not in row}
        self._old.pop(cell.name, None)
        self._results.add(row)
        if self._table.ended(cell.name, row):
            progress.advance(steps=1, work=self._work[cell.name])

    def _forget(self, rows: dict[str, dict[str, Any]]) -> None:
        """Removes passes that no cell of the sweep will read any more."""
        cells, read = self._maker.sweep.cells, set()
        for cell in cells:
            if rows.get(cell.name, {}).get("status") != DONE:
                read |= {of.name for of in self._maker.passes(cell)}
        for of in {of.name: of for cell in cells for of in self._maker.passes(cell)}.values():
            if of.name in read or not self._maker.is_made(of):
                continue
            with self._directory.claim(of.name) as mine:
                if mine:
                    self._maker.forget(of)
