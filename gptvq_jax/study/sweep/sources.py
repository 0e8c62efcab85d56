"""The float models of a sweep, each opened once."""

from gptvq_jax.models.open import open_source
from gptvq_jax.models.source import ModelSource
from gptvq_jax.run import job
from gptvq_jax.run.formats import settled_fields
from gptvq_jax.study.sweep.cells import Cell


class Sources:
    """The models that cells name."""

    def __init__(self):
        self._opened: dict[str, ModelSource] = {}

    def of(self, cell: Cell) -> ModelSource:
        """The float model of a cell.

        Raises:
          ValueError, OSError: as `open_source`.
        """
        name = cell.settings.model
        if name not in self._opened:
            self._opened[name] = open_source(name)
        return self._opened[name]

    def check(self, cell: Cell) -> None:
        """Sees whether its model allows a cell.

        Raises:
          ValueError: not this cell.
          OSError: no cell of this model, which cannot be opened.
        """
        try:
            source = self.of(cell)
        except ValueError as error:  # which would refuse this cell alone
            raise OSError(str(error)) from error
        job.check_plan(source, cell.settings)

    def settled(self, cell: Cell) -> dict[str, str]:
        """{field: why it has no effect} for those that rules settle for all layers of its model."""
        return settled_fields(cell.settings, self.of(cell).config)
