"""Gradients and curves without the quantization that follows them in a run."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from steps import Steps

from gptvq_jax.config import RunSettings
from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.models.source import ModelSource
from gptvq_jax.run import passes
from gptvq_jax.run.context import Context
from gptvq_jax.run.workdir import WorkDir


def find(
    source: ModelSource,
    settings: RunSettings,
    path: Path,
    tokens: np.ndarray,
    limit: int | None = None,
) -> Steps:
    """Token weights and curves in a work directory, with any config; returns both passes' steps.

    Raises KeyboardInterrupt at the given step.
    """
    bar = Steps(limit)
    with pytest.MonkeyPatch.context() as patch, WorkDir(path, {}) as workdir:
        patch.setattr(passes, "Progress", lambda *_: contextlib.nullcontext(bar))
        passes.find_gradients(Context(source, settings, workdir, None, Stopwatch()), tokens)
    return bar


def contents(path: Path) -> dict[str, bytes]:
    """What the passes have left, by name."""
    folders = (path / name for name in ("activations", "gradients", "curves"))
    return {file.name: file.read_bytes() for folder in folders for file in folder.glob("*")}
