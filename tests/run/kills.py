"""Runs that are killed at a change of file names: where, and what they leave."""

import contextlib
import json
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from gptvq_jax.run import job
from gptvq_jax.run.evaluate import Evaluation
from gptvq_jax.run.forward import Forward
from gptvq_jax.run.gradients import Backward
from gptvq_jax.run.quantize import Quantize

_CHANGES = [(os, "replace"), (os, "rename"), (os, "unlink"), (os, "remove"), (shutil, "rmtree")]
_DIGEST = re.compile("-[0-9a-f]{12}(?=.npy)")  # of a model and a text
Visit = tuple[str, int]  # name of a pass, block


class Changes:
    """Watches renames and removals below a directory.

    Those of Orbax are in threads of its own, and what it writes does not count before the record
    beside it is renamed; they are not watched.

    Attributes:
      made: names of the files that were renamed to or removed so far, in order, each after what
        was done; without the digest of a model and a text.
    """

    def __init__(
        self, directory: Path, before: Callable[[int], None], after: Callable[[int], None]
    ):
        self._directory, self._before, self._after = str(directory), before, after
        self.made: list[str] = []
        self._main, self._inside = threading.current_thread(), False

    @contextlib.contextmanager
    def watched(self):
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in _CHANGES:
                patch.setattr(owner, name, self._watching(name, getattr(owner, name)))
            yield self

    def _watching(self, name, function):
        def watching(path, *args, **kwargs):
            here = str(path).startswith(self._directory)
            own = threading.current_thread() is self._main
            if self._inside or not (here and own):  # a tree is removed as a whole
                return function(path, *args, **kwargs)
            self._inside = True
            try:
                number = len(self.made)
                self._before(number)
                result = function(path, *args, **kwargs)
                target = args[0] if name in ("replace", "rename") else path
                file = _DIGEST.sub("", os.path.relpath(target, self._directory))
                self.made.append(f"{name} {file}")
                self._after(number)
                return result
            finally:
                self._inside = False

        return watching


@contextlib.contextmanager
def counted_visits():
    """Counts the visits that begin."""
    begun: Counter[Visit] = Counter()

    def counting(visit):
        def count(visitor, index, block):
            name = type(visitor).__name__
            if isinstance(visitor, Evaluation):
                name += f" of {visitor.files.directory.name}"
            begun[name, index] += 1
            visit(visitor, index, block)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for visitor in (Forward, Backward, Quantize, Evaluation):
            patch.setattr(visitor, "visit", counting(visitor.visit))
        yield begun


def commit(visit: Visit, depth: int) -> str:
    """The change that makes a visit count as done."""
    name, index = visit
    if name.startswith("Evaluation"):
        what = "outputs" if index + 1 == depth else "evaluation"
        return f"replace evaluation/{name.split()[-1]}/{index + 1:05d}.{what}.npy"
    return {
        "Forward": f"replace activations/{index + 1:05d}.float.npy",
        "Backward": f"replace gradients/{index:05d}.npz",
        "Quantize": f"replace checkpoint/blocks/{index:05d}/record.json",
    }[name]


def run(config, path: Path) -> Counter[Visit]:
    """A run, without its picture, which takes as long as all else; returns its visits."""
    with pytest.MonkeyPatch.context() as patch, counted_visits() as visits:
        patch.setattr("gptvq_jax.console.layer_plot.plot", lambda *_: None)
        job.quantize(config, str(path))
    return visits


_TOOK = (
    *("seconds", "compile_seconds", "stages", "totals", "resumed_at"),
    *("peak_memory_bytes", "checkpoint_bytes"),
)


def result(path: Path) -> dict[str, bytes | list]:
    """What a run has made, but for what it took.

    Orbax names files by chance and notes the time in them; the manifest holds the SHA-256 of every
    array.
    """
    rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    made: dict[str, bytes | list] = {
        "metrics": [{k: v for k, v in row.items() if k not in _TOOK} for row in rows]
    }
    for file in path.rglob("*"):
        name = str(file.relative_to(path))
        noise = "/arrays/" in name or name.endswith("record.json") or name == "metrics.jsonl"
        if file.is_file() and not noise:
            made[name] = file.read_bytes()
    return made
