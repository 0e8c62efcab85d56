"""What the passes of a run share."""

from typing import NamedTuple

from gptvq_jax.config import RunSettings
from gptvq_jax.console.progress import Progress
from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.models.source import ModelSource
from gptvq_jax.run.stream_files import StreamFiles
from gptvq_jax.run.workdir import WorkDir


class Context(NamedTuple):
    """Of one run."""

    source: ModelSource  # the float model
    settings: RunSettings
    workdir: WorkDir  # opened with these settings
    progress: Progress
    stopwatch: Stopwatch

    @property
    def files(self) -> StreamFiles:
        return self.workdir.streams
