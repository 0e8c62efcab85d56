"""Makes what cells share (passes.py), and hands it to them.

A pass is made in an ordinary work directory of its own. A later one starts from the files of those
before it, and a cell from those of all that it needs: hard links, so that who removes a file does
not remove it for the others. A run that finds these files in its work directory takes the pass for
done (run/walk.py), and what it makes is the same to the last bit.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptvq_jax.config import RunSettings, TuneSettings
from gptvq_jax.console.progress import Progress
from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.files import durable
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.source import ModelSource
from gptvq_jax.run import forward, job
from gptvq_jax.run.context import Context
from gptvq_jax.run.float_moments import FloatMoments
from gptvq_jax.run.formats import num_quantized
from gptvq_jax.run.forward import Forward, wants_float, wants_middle
from gptvq_jax.run.passes import find_gradients
from gptvq_jax.run.walk import walk
from gptvq_jax.run.workdir import WorkDir
from gptvq_jax.study.sweep.passes import FLOAT, GRADIENTS, MOMENTS, Pass, pass_bytes

_DONE = "done.json"  # written last
# What each pass leaves, but for the streams.
_FILES = {
    FLOAT: ("tokens.npy", "held_out.npy", "evaluation/float/*"),
    GRADIENTS: ("gradients/*", "curves/*"),
    MOMENTS: ("moments/*",),
}
_TITLES = {FLOAT: "float model", MOMENTS: "its Hessians"}
Where = Callable[[str], Path]  # name of a pass -> its directory


def is_made(of: Pass, where: Where) -> bool:
    """Whether a pass is finished."""
    return (where(of.name) / _DONE).exists()


def make(of: Pass, source: ModelSource, where: Where) -> None:
    """Makes a pass whose parents are made, going on where a killed process has stopped.

    Raises:
      ValueError, FullDiskError: as a run does.
    """
    stopwatch = Stopwatch()
    with WorkDir(where(of.name), of.key) as workdir:
        for parent in of.parents:
            _link([*_made(parent, where), *_streams(parent, where)], where(parent.name), workdir)
        held_out, tokens = job.texts(source, of.settings, workdir)
        context = Context(source, of.settings, workdir, None, stopwatch)
        if of.kind == GRADIENTS:
            find_gradients(context._replace(settings=_keeping_nothing(of.settings)), tokens)
        else:
            _walk_up(of, context, tokens, held_out)
        for stream in () if of.kind == FLOAT else (forward.STREAM, forward.MIDDLE):
            workdir.streams.drop(stream)  # its links
        durable.write_text(workdir.path / _DONE, json.dumps({"seconds": stopwatch.total}) + "\n")


def _walk_up(of: Pass, context: Context, tokens: np.ndarray, held_out: np.ndarray) -> None:
    """Everything that goes up through the float model's blocks."""
    source, settings, workdir, _, stopwatch = context
    depth = source.config.num_hidden_layers
    files = "moments/*" if of.kind == MOMENTS else "activations/*"
    workdir.check_room(pass_bytes(of, source.config), files)
    if of.kind == MOMENTS:
        visitors: list[Any] = [FloatMoments(context, num_quantized(settings, source.config))]
    else:
        visitors = [job.float_evaluation(source, settings, workdir, held_out, stopwatch)]
        if of.points:
            visitors.insert(0, Forward(context, tokens, of.points, 0, of.middle))
    with Progress(depth, _TITLES[of.kind], "block") as progress:
        walk(source, visitors, range(depth), stopwatch, progress)


def _keeping_nothing(settings: RunSettings) -> RunSettings:
    """Settings under which the float model's streams are dropped on the way; the links, that is."""
    c = dataclasses.replace(settings.calibration, asymmetry=0.0, inputs="quantized")
    return dataclasses.replace(settings, calibration=c, tune=TuneSettings())


def lend(
    passes: Sequence[Pass],
    settings: RunSettings,
    config: ModelConfig,
    where: Where,
    workdir: WorkDir,
) -> None:
    """Puts into the work directory of a run what passes have made for it.

    Args:
      passes: that the run needs.
      settings: of the run.
      config: of the model.
      where: the passes are.
      workdir: of the run.
    """
    last, middle = num_quantized(settings, config), wants_middle(settings)

    def is_read(file: Path) -> bool:
        point, stream, _ = file.name.split(".")
        return int(point) <= last if stream == forward.STREAM else middle and int(point) < last

    for of in passes:
        files = list(_made(of, where))
        if wants_float(settings):
            files += filter(is_read, _streams(of, where))
        _link(files, where(of.name), workdir)


def forget(of: Pass, where: Where) -> None:
    """Removes what a pass has made, which nobody will read any more."""
    path = where(of.name)
    (path / _DONE).unlink(missing_ok=True)  # first: what is not whole must not count
    for folder in ("activations", "gradients", "curves", "moments", "evaluation"):
        shutil.rmtree(path / folder, ignore_errors=True)


def _made(of: Pass, where: Where) -> Iterator[Path]:
    for pattern in _FILES[of.kind]:
        yield from where(of.name).glob(pattern)


def _streams(of: Pass, where: Where) -> Iterator[Path]:
    for stream in (forward.STREAM, forward.MIDDLE) if of.kind == FLOAT else ():
        yield from where(of.name).glob(f"activations/*.{stream}.npy")


def _link(files: Iterable[Path], root: Path, workdir: WorkDir) -> None:
    """Links files below `root`, or copies them where the filesystem cannot; what is there stays."""
    for file in files:
        target = workdir.path / file.relative_to(root)
        if target.exists() or file.suffix == ".partial":
            continue
        durable.make_directory(target.parent)
        try:
            os.link(file, target)
        except OSError:  # no links here, or too many
            with durable.replacing(target, file.stat().st_size) as partial:
                shutil.copyfile(file, partial)
