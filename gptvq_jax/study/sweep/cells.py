"""The cells of a sweep: every combination of the points of its axes that can be, and why not."""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import config_dict

from gptvq_jax.config import RunSettings, flat, from_config, to_dict
from gptvq_jax.run.overrides import ignored, settle_budget
from gptvq_jax.study.sweep.axes import Axis, Point

# What a setting on layers depends on; the rest of a run's config is about whole models.
_OF_LAYERS = (
    *("model", "method", "damping", "seed", "vq.*", "aqlm.*", "trellis.*", "uniform.*"),
    *(f"calibration.{name}" for name in ("datasets", "dataset_weights", "num_windows")),
    *("calibration.seqlen", "calibration.seed"),
    *(f"evaluation.{name}" for name in ("dataset", "num_windows", "seqlen")),
)


class Cell(NamedTuple):
    """Of a sweep."""

    name: str
    point: dict[str, str]  # {axis: point}
    fields: dict[str, Any]  # that its points set
    config: config_dict.ConfigDict  # of the run, settled
    settings: RunSettings  # the same, frozen
    source: str  # the config it is nearest to, with its argument, or ""
    named: Sequence[str]  # fields that somebody names for it, which are to have an effect


class Refused(NamedTuple):
    """A combination that cannot be."""

    name: str
    reason: str


class Sweep(NamedTuple):
    """A config of a sweep, resolved."""

    name: str
    kind: str
    base: config_dict.ConfigDict
    axes: Sequence[Axis]
    cells: list[Cell]
    refused: list[Refused]
    notes: list[str]  # for the user, on what was settled
    given: Sequence[str]  # fields of the base that the command line names


def resolve(config: config_dict.ConfigDict, given: Collection[str] = ()) -> Sweep:
    """The cells that a config means.

    Args:
      config: as `axes.sweep` gives it, with the values of the command line in it.
      given: fields that the command line names, such as "base.vq.dim"; each must have an effect.

    Raises:
      ValueError: not a sweep's config; a field of the base, of an axis or of the command line has
        no effect in any cell, or two axes set the same; or no cell can be.
    """
    fields = {"name", "kind", "base", "source", "axes", "cells"}
    if not isinstance(config, config_dict.ConfigDict) or {*config} != fields:
        raise ValueError(
            "get_config of a sweep's config file must return what study.sweep.axes.sweep gives; "
            "configs/sweeps/ shows how it looks"
        )
    named = _of_base(given)
    _check_axes(config, named)
    cells, refused, notes = [], [], []
    for chosen in itertools.product(*(of.points for of in config.axes)):
        name = "_".join(point.name for point in chosen)
        try:
            cell, note = _cell(config, chosen, named)
        except ValueError as error:
            refused.append(Refused(name, str(error)))
            continue
        if note and note not in notes:
            notes.append(note)
        cells.append(cell)
    sweep = Sweep(config.name, config.kind, config.base, config.axes, cells, refused, notes, named)
    return distinct(_not_empty(sweep), lambda cell: ignored(cell.settings))


def distinct(sweep: Sweep, idle: Callable[[Cell], Mapping[str, str]]) -> Sweep:
    """The sweep without cells that make the same run as an earlier one.

    Args:
      sweep: resolved.
      idle: {field: why it has no effect} in a cell.

    Raises:
      ValueError: a field that somebody names has no effect in any cell where it had one so far.
    """
    cells, refused, effects = [], [*sweep.refused], _Effects()
    seen: dict[str, str] = {}  # what a cell does: its name
    for cell in sweep.cells:
        reasons = idle(cell)
        effects.add(cell.named, reasons)
        without = {*reasons, *ignored(cell.settings)}
        what = repr({f: v for f, v in flat(to_dict(cell.settings)).items() if f not in without})
        if what in seen:
            refused.append(Refused(cell.name, f"it would be the same run as {seen[what]}"))
            continue
        seen[what] = cell.name
        cells.append(cell._replace(named=[f for f in cell.named if f not in reasons]))
    effects.check(sweep.given)
    return sweep._replace(cells=cells, refused=refused)


def refuse(sweep: Sweep, check: Callable[[Cell], None]) -> Sweep:
    """The sweep without cells for which a check raises ValueError, which says why not."""
    cells, refused = [], [*sweep.refused]
    for cell in sweep.cells:
        try:
            check(cell)
        except ValueError as error:
            refused.append(Refused(cell.name, str(error)))
        else:
            cells.append(cell)
    return _not_empty(sweep._replace(cells=cells, refused=refused), len(sweep.refused))


def _not_empty(sweep: Sweep, earlier: int = 0) -> Sweep:
    """The sweep. Raises ValueError, with what most cells fail at, where it has no cells.

    What was refused `earlier` did not empty it: a grid has cells that no run allows.
    """
    if not sweep.cells:
        last = sweep.refused[earlier:]
        (common, _), *_ = Counter(reason for _, reason in last).most_common(1)
        name = next(name for name, reason in last if reason == common)
        raise ValueError(f"no cell of sweep {sweep.name!r} can be; {name}: {common}")
    return sweep


class _Effects:
    """In which cells a field has an effect, over all of them."""

    def __init__(self):
        self._useless: dict[str, str] = {}
        self._useful: set[str] = set()

    def add(self, fields: Sequence[str], reasons: dict[str, str]) -> None:
        for field in fields:
            if field in reasons:
                self._useless[field] = reasons[field]
            else:
                self._useful.add(field)

    def check(self, named: Collection[str]) -> None:
        for field, reason in self._useless.items():
            if field not in self._useful:
                what = f"--config.base.{field}" if field in named else f"{field} of an axis"
                raise ValueError(f"{what} has no effect {reason}")


def _of_base(given: Collection[str]) -> list[str]:
    """Fields of the base among those of the command line."""
    for field in given:
        if not field.startswith("base."):
            raise ValueError(
                f"--config.{field} is not to be set; set fields of all cells, as in "
                "--config.base.vq.group_size=4096, or write a config of your own"
            )
    return [field.removeprefix("base.") for field in given]


def _check_axes(config: config_dict.ConfigDict, named: Collection[str]) -> None:
    """Refuses a field that two axes set, or the command line and an axis."""
    owner: dict[str, str] = {}
    for of in config.axes:
        for field in {field for point in of.points for field in point.fields}:
            if field in owner:
                raise ValueError(f"axes {owner[field]!r} and {of.name!r} both set {field}; let one")
            owner[field] = of.name
    for fields in config.cells.fields.values():
        for field in () if isinstance(fields, str) else fields:
            if owner.setdefault(field, "cells") != "cells":
                raise ValueError(f"axis {owner[field]!r} and cells= both set {field}; let one")
    for field in named:
        if field in owner:
            raise ValueError(
                f"--config.base.{field} has no effect where {owner[field]!r} sets it; take "
                "some of its cells with --cells, or write a config of your own"
            )
    if config.kind != "layers":
        return
    for field in [*named, *owner]:
        if not any(field == known or known == f"{field.split('.')[0]}.*" for known in _OF_LAYERS):
            raise ValueError(
                f"{field} has no effect on layers by themselves, which know "
                f"{', '.join(_OF_LAYERS)}; remove it, or make it a sweep of kind 'models'"
            )
    if config.base.allocation.bits_per_value:
        raise ValueError(
            "allocation.bits_per_value of a sweep of layers must be 0: a budget is of a whole model"
        )
    if config.base.recipe:
        raise ValueError(
            "recipe of a sweep of layers must be (): every layer gets what the cell says; make it "
            "a sweep of kind 'models'"
        )


def _own(config: config_dict.ConfigDict, chosen: Sequence[Point]) -> dict[str, Any]:
    """What a cell sets besides its points. Raises ValueError where it is left out."""
    own = config.cells.fields.get(tuple(point.name for point in chosen), {})
    if isinstance(own, str):
        raise ValueError(own)
    return dict(own)


def _cell(
    config: config_dict.ConfigDict, chosen: Sequence[Point], named: Sequence[str]
) -> tuple[Cell, str]:
    """A cell, and a note for the user. Raises ValueError where it cannot be."""
    own = config.base.copy_and_resolve_references()
    fields = {field: value for point in chosen for field, value in point.fields.items()}
    fields |= (of_cell := _own(config, chosen))
    of_points = (field for point in chosen if not point.config for field in point.fields)
    counting = list(dict.fromkeys([*named, *of_points, *of_cell]))
    own.update_from_flattened_dict(fields)
    own, note = settle_budget(own, [*named, *fields])
    nearest = next((point.config for point in chosen if point.config), config.source)
    names = zip((of.name for of in config.axes), (point.name for point in chosen), strict=True)
    name = "_".join(point.name for point in chosen)
    cell = Cell(name, dict(names), fields, own, from_config(own), nearest, counting)
    return cell, note.replace("--config.", "")
