"""A sweep from its config to its results, and its plan. What scripts/sweep.py calls."""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import config_dict
from tqdm import tqdm

from gptvq_jax.recipe import parse, rule_text
from gptvq_jax.study.matmul_rate import matmul_rate
from gptvq_jax.study.sweep import estimate
from gptvq_jax.study.sweep.cells import Cell, resolve
from gptvq_jax.study.sweep.directory import Directory, record_of
from gptvq_jax.study.sweep.drive import Drive, Maker, choose
from gptvq_jax.study.sweep.layers import Layers
from gptvq_jax.study.sweep.models import Models
from gptvq_jax.study.sweep.results import DONE, Results
from gptvq_jax.study.sweep.table import Table

_MAKERS = {"models": Models, "layers": Layers}


def sweep(
    config: config_dict.ConfigDict,
    origin: str,
    given: Collection[str],
    workdir: str,
    pattern: str | None = None,
) -> list[str]:
    """Makes the cells of a sweep and prints their table; returns the names of those that failed.

    Args:
      config: as `axes.sweep` gives it, with the values of the command line in it.
      origin: its file, with the argument.
      given: fields that the command line names, such as "base.vq.dim".
      workdir: directory of everything that is written; an earlier start there goes on.
      pattern: regular expression of the names of the cells to make; None: all.

    Raises:
      ValueError: a field that does not exist or has no effect, no cell that can be, or the
        directory of another sweep.
      FullDiskError: no cell has room.
    """
    maker, chosen = _resolved(config, given, workdir, pattern)
    record = record_of(maker.sweep, origin, given)
    directory = Directory(workdir)
    directory.open(record)
    _tell(maker)
    cells = {cell["name"]: cell for cell in record["cells"]}
    todo = _to_do(maker, directory, chosen)
    time = _seconds(maker, todo)
    work = {cell.name: maker.cell_flop(cell) for cell in maker.sweep.cells}
    with Table(maker.sweep.kind, [cell.name for cell in chosen]) as table:
        failed = Drive(maker, directory, cells, chosen, work, table, time).run()
    print(f"\n{table.text()}\n\nwritten to {directory.path}")
    return failed


def plan(
    config: config_dict.ConfigDict,
    origin: str,
    given: Collection[str],
    workdir: str,
    pattern: str | None = None,
) -> None:
    """Prints what `sweep` with the same arguments would do, and what that takes; writes nothing."""
    maker, chosen = _resolved(config, given, workdir, pattern)
    directory = Directory(workdir)
    directory.check(record_of(maker.sweep, origin, given))
    done, left, passes, missing = todo = _to_do(maker, directory, chosen)
    print(f"sweep {maker.sweep.name}: {len(chosen)} cells, {len(chosen) - len(left)} finished\n")
    for cell in chosen:
        state = "finished" if cell.name in done else "to do"
        needs = ", ".join(of.name for of in maker.passes(cell))
        print(f"  {cell.name:20s} {state:9s} {_fields(cell.fields)}; reads {needs}")
    if maker.sweep.base.recipe and not all("recipe" in cell.fields for cell in chosen):
        print(f"\nrecipe of cells that name none: {_recipe(maker.sweep.base.recipe)}")
    print("\nmade once for all that read it:")
    for name, (_, cell) in passes.items():
        readers = sum(name in {of.name for of in maker.passes(other)} for other in left)
        state = "to do" if name in missing else "made"
        print(f"  {name:24s} {state:9s} for {readers} cells of {cell.settings.model}")
    _tell(maker)
    time = _seconds(maker, todo)
    held = sum(maker.pass_bytes(of, cell) for of, cell in passes.values())
    sizes = [maker.cell_bytes(cell) for cell in left] or [(0, 0)]
    stays, beside = sum(stays for stays, _ in sizes), max(beside for _, beside in sizes)
    least = "at least " * time.at_least
    print(f"\ntime  {least}{tqdm.format_interval(time.value)} in one process ({time.basis})")
    print(
        f"disk  {(stays + held + beside) / 1e9:.2f} GB at most: {stays / 1e9:.2f} GB of cells, "
        f"{held / 1e9:.2f} GB of shared files, which are removed in the end, and "
        f"{beside / 1e9:.2f} GB while a cell is made"
    )


class _ToDo(NamedTuple):
    """How far a sweep is."""

    done: dict[str, dict[str, Any]]  # rows of finished cells
    left: list[Cell]  # of those that are wanted
    passes: dict[str, tuple[Any, Cell]]  # that they read, each with a cell that does
    missing: dict[str, tuple[Any, Cell]]  # the passes that nobody has made


def _to_do(maker: Maker, directory: Directory, chosen: Sequence[Cell]) -> _ToDo:
    rows = Results(directory, [cell.name for cell in maker.sweep.cells]).rows()
    done = {name: row for name, row in rows.items() if row["status"] == DONE}
    left = [cell for cell in chosen if cell.name not in done]
    passes = {of.name: (of, cell) for cell in left for of in maker.passes(cell)}
    missing = {name: pair for name, pair in passes.items() if not maker.is_made(pair[0])}
    return _ToDo(done, left, passes, missing)


def _seconds(maker: Maker, todo: _ToDo) -> estimate.Seconds:
    """What is left will take."""

    def rate() -> float:
        _say("measuring the matrix products of this machine, a few seconds")
        return matmul_rate()

    flop = {cell.name: maker.cell_flop(cell) for cell in maker.sweep.cells}
    of_passes = sum(maker.pass_flop(of, cell) for of, cell in todo.missing.values())
    names = [cell.name for cell in todo.left]
    return estimate.seconds(flop, names, of_passes, todo.done, rate)


def _resolved(
    config: config_dict.ConfigDict,
    given: Collection[str],
    workdir: str,
    pattern: str | None,
) -> tuple[Maker, list[Cell]]:
    """What makes the cells, and those that are wanted."""
    _say("working out the cells")
    resolved = resolve(config, given)
    _say(f"reading the models of {len(resolved.cells)} cells")
    maker = _MAKERS[resolved.kind](resolved, Path(workdir))
    return maker, choose(maker.sweep.cells, pattern)


def _say(text: str) -> None:
    """What takes a while, beside the results: on standard error."""
    print(f"{text} ...", file=sys.stderr, flush=True)


def _tell(maker: Maker) -> None:
    """Prints what was settled, and what cannot be."""
    for note in maker.sweep.notes:
        print(note)
    for name, reason in maker.sweep.refused:
        print(f"refused: {name}: {reason}")


def _fields(fields: dict[str, Any]) -> str:
    texts = (f"{f}={_recipe(v) if f == 'recipe' else v}" for f, v in fields.items())
    return ", ".join(texts) or "the base"


def _recipe(value: Any) -> str:
    """The rules of a config's `recipe`."""
    rules = parse(value)
    return "; ".join(rule_text(rules, rule) for rule in rules) or "none"
