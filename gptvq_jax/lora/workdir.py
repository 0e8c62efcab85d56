"""The directory of an adapter while it is trained: what a stopped training needs to go on.

    adapter_config.json, adapter_model.safetensors    PEFT's files of the best state so far
    training.json       settings, and digests of the model and the text; others are refused
    metrics.jsonl       a line per step and per look at the held-out loss, and a summary
    state-000100/       after step 100: state.json, numbers, and arrays/, Orbax's files

A state appears under its name once all of it is on the disk; then the one before it goes.
"""

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

from gptvq_jax.adapters.peft_config import FILE
from gptvq_jax.config import difference
from gptvq_jax.console.errors import first_line
from gptvq_jax.console.json_file import read_json_lines, read_own_object
from gptvq_jax.files import durable
from gptvq_jax.files.disk_space import FullDiskError, naming_full_disk
from gptvq_jax.storage import orbax_files

_SETTINGS, _METRICS = "training.json", "metrics.jsonl"
_OF_OTHERS = ("manifest.json", "config.json", "sweep.json", FILE)


class LoraDir:
    """Opens (or makes) the directory and locks it for this process until it is closed.

    Args:
      path: of the directory.
      settings: JSON types only.

    Raises:
      ValueError: it cannot be written, holds something else, belongs to other settings, or another
        process uses it.
      FullDiskError: there is no room.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]):
        self.path = Path(path)
        begun = (self.path / _SETTINGS).exists()
        for name in () if begun else _OF_OTHERS:
            if (self.path / name).exists():
                raise ValueError(
                    f"{self.path} holds {name}, which no training wrote there; pass another --out"
                )
        try:
            with naming_full_disk(self.path):
                durable.make_directory(self.path)
                self._lock = open(self.path / "lock", "w")  # noqa: SIM115 - held until close
        except FullDiskError:
            raise
        except OSError as error:
            raise ValueError(
                f"cannot write to {self.path} ({error.strerror}); pass another --out"
            ) from error
        try:
            self._claim()
            self._check(settings)
            for partial in self.path.glob("state-*.partial"):
                shutil.rmtree(partial)
            durable.drop_partial(self.path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "LoraDir":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Lets other processes use the directory."""
        self._lock.close()

    def _claim(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"another process is training in {self.path}; wait for it or pass another --out"
            ) from error

    def _check(self, settings: dict[str, Any]) -> None:
        path, new = self.path / _SETTINGS, json.loads(json.dumps(settings))
        if not path.exists():
            durable.write_text(path, json.dumps(new, indent=2) + "\n")
            return
        try:
            old = read_own_object(path)
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged: {error}; restore it, or pass another --out"
            ) from None
        if changed := difference(old, new):
            raise ValueError(
                f"{self.path} was begun with other settings: {'; '.join(changed)}. Give the same "
                "ones to go on, or pass another --out"
            )

    def rows(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl."""
        path = self.path / _METRICS
        return read_json_lines(path) if path.exists() else []

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Adds rows to metrics.jsonl."""
        durable.append_lines(self.path / _METRICS, rows)

    def save(self, step: int, numbers: dict[str, Any], arrays: dict[str, Any]) -> None:
        """Keeps a state, in place of those before it.

        Args:
          step: that it is after.
          numbers: JSON types only.
          arrays: a nested dict of host arrays.

        Raises:
          FullDiskError: there is no room.
        """
        path = self.path / f"state-{step:06d}"
        partial = path.with_suffix(".partial")
        with naming_full_disk(path):
            partial.mkdir()
            orbax_files.save(partial / "arrays", arrays)
            durable.write_text(partial / "state.json", json.dumps(numbers) + "\n")
            durable.sync_tree(partial)
            durable.rename(partial, path)
        for old in self._states():
            if old != path:
                shutil.rmtree(old)

    def load(self) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """The newest state, as `save` was given it, with metrics.jsonl as it was then; or None.

        Raises:
          ValueError: it is damaged.
        """
        found = self._states()
        if not found:
            (self.path / _METRICS).unlink(missing_ok=True)
            return None
        path = found[-1]
        try:
            numbers = read_own_object(path / "state.json")
            arrays = orbax_files.load(path / "arrays")
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(
                f"{path} is damaged ({first_line(error)}); remove it, and the training starts again"
            ) from None
        step = int(path.name.removeprefix("state-"))
        kept = [row for row in self.rows() if row.get("step", 0) <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        durable.write_text(self.path / _METRICS, text)
        return step, numbers, arrays

    def _states(self) -> list[Path]:
        return sorted(p for p in self.path.glob("state-*") if p.name[6:].isdigit())
