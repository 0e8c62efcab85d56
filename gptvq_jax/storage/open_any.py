"""Opens a model, packed or not."""

import os
from pathlib import Path

from gptvq_jax.models.open import open_source
from gptvq_jax.models.source import ModelSource
from gptvq_jax.storage.checkpoint import PackedCheckpoint


def open_any(path: str) -> ModelSource:
    """Opens a model for reading.

    Args:
      path: directory of a packed checkpoint, or what `open_source` takes.

    Raises:
      FileNotFoundError, ValueError, NotImplementedError: as PackedCheckpoint and `open_source`.
    """
    directory = Path(os.path.expanduser(path))
    # Of a run that is not finished: only the first says so.
    if (directory / "manifest.json").exists() or (directory / "blocks").is_dir():
        return PackedCheckpoint(directory)
    return open_source(path)
