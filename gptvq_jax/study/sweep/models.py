"""A cell that is a run over a whole model, as scripts/quantize.py makes it."""

import contextlib
import io
from functools import partial
from pathlib import Path
from typing import Any

from gptvq_jax.files.durable import write_text
from gptvq_jax.run import job
from gptvq_jax.study.sweep import estimate, lending
from gptvq_jax.study.sweep.cells import Cell, Sweep, distinct, refuse
from gptvq_jax.study.sweep.directory import Directory
from gptvq_jax.study.sweep.passes import Pass, pass_bytes, passes_of, shared
from gptvq_jax.study.sweep.sources import Sources


class Models:
    """How the cells of a sweep of kind "models" are made; see drive.Maker.

    Args:
      sweep: resolved; `self.sweep` has no cells that their models do not allow.
      path: of the sweep's directory.
    """

    def __init__(self, sweep: Sweep, path: str | Path):
        self._directory, self._sources = Directory(path), Sources()
        self.sweep = distinct(refuse(sweep, self._sources.check), self._sources.settled)
        needs = [passes_of(cell.settings, self._sources.of(cell)) for cell in self.sweep.cells]
        names = [cell.name for cell in self.sweep.cells]
        self._passes = dict(zip(names, shared(needs), strict=True))

    def passes(self, cell: Cell) -> list[Pass]:
        """What a cell needs that others may need too, in order."""
        return self._passes[cell.name]

    def is_made(self, of: Pass) -> bool:
        return lending.is_made(of, self._directory.shared)

    def make(self, of: Pass, cell: Cell) -> None:
        """Makes a pass that `cell` needs."""
        lending.make(of, self._sources.of(cell), self._directory.shared)

    def forget(self, of: Pass) -> None:
        lending.forget(of, self._directory.shared)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Makes a cell, or reads one that is finished; the fields of its summary."""
        path = self._directory.cell(cell.name)
        source, passes = self._sources.of(cell), self.passes(cell)
        where = self._directory.shared
        prepare = partial(lending.lend, passes, cell.settings, source.config, where)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            summary = job.quantize(cell.config, str(path), prepare=prepare)
        write_text(path / "report.txt", printed.getvalue())
        return {name: value for name, value in summary.items() if name != "kind"}

    def cell_flop(self, cell: Cell) -> float:
        return estimate.cell_flop(self._sources.of(cell).config, cell.settings)

    def pass_flop(self, of: Pass, cell: Cell) -> float:
        return estimate.pass_flop(self._sources.of(cell).config, of)

    def cell_bytes(self, cell: Cell) -> tuple[int, int]:
        return estimate.cell_bytes(self._sources.of(cell).config, cell.settings)

    def pass_bytes(self, of: Pass, cell: Cell) -> int:
        return pass_bytes(of, self._sources.of(cell).config)
