"""A cell that is a run over a whole model, as scripts/quantize.py makes it."""

import contextlib
import io
from functools import partial
from pathlib import Path
from typing import Any

from gptvq_jax.files.durable import write_text
from gptvq_jax.models.open import open_source
from gptvq_jax.models.source import ModelSource
from gptvq_jax.run import job
from gptvq_jax.study.sweep import lending
from gptvq_jax.study.sweep.cells import Cell, Sweep, refuse
from gptvq_jax.study.sweep.directory import Directory
from gptvq_jax.study.sweep.passes import Pass, passes_of, shared

SHOWN = ("bits_per_value", "perplexity_quantized")  # of a row, in the table


class Models:
    """How the cells of a sweep of kind "models" are made.

    Args:
      sweep: resolved; `self.sweep` has no cells that its models do not allow.
      path: of the sweep's directory.
    """

    def __init__(self, sweep: Sweep, path: str | Path):
        self._directory = Directory(path)
        self._sources: dict[str, ModelSource] = {}
        self.sweep = refuse(sweep, self._check)
        needs = [passes_of(cell.settings, self.source(cell)) for cell in self.sweep.cells]
        names = [cell.name for cell in self.sweep.cells]
        self._passes = dict(zip(names, shared(needs), strict=True))

    def source(self, cell: Cell) -> ModelSource:
        """The float model of a cell."""
        name = cell.settings.model
        if name not in self._sources:
            self._sources[name] = open_source(name)
        return self._sources[name]

    def _check(self, cell: Cell) -> None:
        try:
            source = self.source(cell)
        except ValueError as error:  # no cell of the model can be made, and no other may hide it
            raise OSError(str(error)) from error
        job.check_plan(source, cell.settings)

    def passes(self, cell: Cell) -> list[Pass]:
        """What a cell needs that others may need too, in order."""
        return self._passes[cell.name]

    def is_made(self, of: Pass) -> bool:
        return lending.is_made(of, self._directory.shared)

    def make(self, of: Pass, cell: Cell) -> None:
        """Makes a pass that `cell` needs."""
        lending.make(of, self.source(cell), self._directory.shared)

    def forget(self, of: Pass) -> None:
        lending.forget(of, self._directory.shared)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Makes a cell, or reads one that is finished; the fields of its summary."""
        path = self._directory.cell(cell.name)
        source, passes = self.source(cell), self.passes(cell)
        where = self._directory.shared
        prepare = partial(lending.lend, passes, cell.settings, source.config, where)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            summary = job.quantize(cell.config, str(path), prepare=prepare)
        write_text(path / "report.txt", printed.getvalue())
        return {name: value for name, value in summary.items() if name != "kind"}
