"""The job of scripts/report.py: read results, draw, write the page."""

from collections.abc import Sequence
from pathlib import Path

from gptvq_jax.console.progress import Progress
from gptvq_jax.console.recipe_text import rule_lines
from gptvq_jax.files import durable
from gptvq_jax.files.disk_space import FullDiskError
from gptvq_jax.study.report.dimension_figures import against_dimension
from gptvq_jax.study.report.drawing import render
from gptvq_jax.study.report.layer_figures import (
    code_usage,
    experts_line,
    of_one,
    side_by_side,
    unused_line,
)
from gptvq_jax.study.report.page import Section, page
from gptvq_jax.study.report.quality_figures import against_bits
from gptvq_jax.study.report.results import Cell, named, read_results
from gptvq_jax.study.report.texts import said
from gptvq_jax.study.report.time_figures import time_by_stage
from gptvq_jax.study.report.tuning_figures import of_tuning, tuning_line


def report(
    directories: Sequence[Path],
    output: Path | None = None,
    prompts: Sequence[str] = (),
    ask: bool = True,
) -> Path:
    """Writes index.html, figures/ and texts.jsonl; prints what is missing and the page's path.

    Args:
      directories: of runs and of sweeps, in any mixture.
      output: directory; None: "report" in the first of them.
      prompts: for the models to continue; none: a few where models are small.
      ask: whether models are asked at all.

    Returns:
      The page.

    Raises:
      ValueError, FileNotFoundError: as `read_results`; a prompt that cannot be read.
      FullDiskError: there is no room.
    """
    directories = _each_once(directories)
    cells, notes = read_results(directories)
    output = directories[0] / "report" if output is None else output
    try:
        durable.make_directory(output / "figures")
    except FullDiskError:
        raise
    except OSError as error:
        raise ValueError(
            f"cannot write to {output} ({error.strerror}); pass another directory with --output"
        ) from error
    sections = _sections(cells, notes)
    texts = said(cells, prompts, output / "texts.jsonl", notes) if ask else {}
    figures = [figure for section in sections for figure in section.figures]
    drawn = {}
    with Progress(len(figures), "report", "figure") as progress:
        for figure in figures:
            files = render(figure)
            drawn[figure.name] = files.inline
            path = output / "figures" / f"{figure.name}.svg"
            durable.write_text(path, files.svg)
            with durable.replacing(path.with_suffix(".png"), len(files.png)) as partial:
                partial.write_bytes(files.png)
            progress.advance(figure.title)
    names = ", ".join(dict.fromkeys(directory.absolute().name for directory in directories))
    count = f"{len(cells)} cells" if len(cells) > 1 else "1 run"
    path = output / "index.html"
    durable.write_text(path, page(f"{names}: {count}", cells, sections, drawn, texts, notes))
    for note in notes:
        print(note)
    print(path)
    return path


def _each_once(directories: Sequence[Path]) -> list[Path]:
    """Directories without those that were named before, of which it says so."""
    found: dict[Path, Path] = {}
    for directory in directories:
        first = found.setdefault(directory.resolve(), directory)
        if first is not directory:
            print(f"{directory} is given twice; it is drawn once")
    return list(found.values())


def _lines(cell: Cell) -> list[str]:
    """Sentences before the figures of a run: what its recipe did, and what its layers had."""
    rules = [
        f"Rule {line}." if line[0].isdigit() else f"{line[0].upper()}{line[1:]}."
        for line in rule_lines([*cell.layers, *cell.outer])
    ]
    return rules + [line for line in (unused_line(cell), experts_line(cell)) if line is not None]


def _sections(cells: Sequence[Cell], notes: list[str]) -> list[Section]:
    """All figures that the results allow."""
    quality = against_bits(cells, notes) + against_dimension(cells, notes)
    with_layers = [cell for cell in cells if cell.layers]
    without = [cell for cell in cells if not cell.layers and cell.status == "done"]
    if without:
        notes.append(f"no layer rows of {named(without)}: errors by layer are left out")
    by_depth = [cell for cell in with_layers if all("block" in row for row in cell.layers)]
    if len(cells) == 1 and by_depth:
        layers, single = of_one(by_depth[0], ""), []
        lines = _lines(by_depth[0])
    else:
        layers = side_by_side(with_layers, notes) if with_layers else []
        lines = []
        single = [
            Section(f"Layers of {cell.name}", of_one(cell, f"cell{index}_"), True, _lines(cell))
            for index, cell in enumerate(by_depth, 1)
        ]
    return [
        Section("Quality", quality),
        *_tunings(cells),
        Section("Layers", layers + code_usage(cells, notes), lines=lines),
        Section("Time", time_by_stage(cells, notes)),
        *single,
    ]


def _tunings(cells: Sequence[Cell]) -> list[Section]:
    """Of each run that was tuned as a whole."""
    sections = []
    for index, cell in enumerate(cells, 1):
        line = tuning_line(cell)
        if line is not None:
            of, stem = (f" of {cell.name}", f"cell{index}_") if len(cells) > 1 else ("", "")
            figures = of_tuning(cell, stem)
            sections.append(Section(f"Tuning of the whole model{of}", figures, lines=[line]))
    return sections
