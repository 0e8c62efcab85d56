"""The work directory of a run: what a killed run needs to go on.

    config.json             the run's settings; a run with others is refused
    tokens.npy              calibration windows (n, T) int32
    activations/            00007.quantized.npy: inputs of block 7 (n, T, hidden), bfloat16 bits;
                            00007.float.npy: the float model's, where the target is asymmetric
    metrics.jsonl           one JSON object per line: layers, blocks, summary
    checkpoint/             the packed model; a block in it is finished

Everything is written under another name and renamed, so a kill leaves the old or the new file.
The inputs of block i + 1 are on disk before block i counts as finished.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gptvq_jax.config import difference


class WorkDir:
    """Opens (or makes) a work directory and locks it for this process until it is closed.

    Raises:
      ValueError: it cannot be written, another process uses it, or it belongs to another config.
    """

    def __init__(self, path: str | Path, config: dict[str, Any]):
        self.path = Path(path)
        try:
            self._activations.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "w")  # noqa: SIM115 - held until close
        except OSError as error:
            raise ValueError(
                f"cannot write to the work directory {self.path} ({error.strerror}); "
                "pass another one with --workdir"
            ) from error
        try:
            self._claim()
            self._check_config(config)
        except ValueError:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Lets other processes use the directory."""
        self._lock.close()

    def _claim(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"another process is using the work directory {self.path}; wait for it or pass "
                "another --workdir"
            ) from error

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def _activations(self) -> Path:
        return self.path / "activations"

    def _check_config(self, config: dict[str, Any]) -> None:
        path = self.path / "config.json"
        new = json.loads(json.dumps(config))
        if not path.exists():
            if self.checkpoint.exists():
                raise ValueError(
                    f"{self.checkpoint} exists but {path} does not: this is no work directory of "
                    "a run; pass another --workdir"
                )
            self._replace(path, lambda tmp: tmp.write_text(json.dumps(new, indent=2) + "\n"))
            return
        try:
            old = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}); pass another --workdir") from error
        changed = difference(old, new)
        if changed:
            raise ValueError(
                f"{self.path} was started with another config: {'; '.join(changed)}. "
                "Restore the config to resume, or pass another --workdir"
            )

    def load_tokens(self) -> np.ndarray | None:
        """Calibration windows of an earlier start, or None."""
        path = self.path / "tokens.npy"
        return np.load(path) if path.exists() else None

    def save_tokens(self, tokens: np.ndarray) -> None:
        self._replace(self.path / "tokens.npy", lambda tmp: _save(tmp, tokens))

    def load_activations(self, block: int, stream: str = "quantized") -> np.ndarray:
        """Inputs of a block (n, T, hidden), bfloat16, in the quantized or the float model."""
        path = self._activations / f"{block:05d}.{stream}.npy"
        if not path.exists():
            raise ValueError(
                f"{path} is missing, so the run cannot go on after block {block - 1}; "
                f"restore the file or remove {self.path} to start again"
            )
        return np.load(path).view(ml_dtypes.bfloat16)

    def save_activations(
        self, block: int, activations: np.ndarray, stream: str = "quantized"
    ) -> None:
        path = self._activations / f"{block:05d}.{stream}.npy"
        self._replace(path, lambda tmp: _save(tmp, activations.view(np.uint16)))

    def drop_activations(self, before: int) -> None:
        """Removes the inputs of blocks that will not run again."""
        for path in self._activations.glob("*.npy"):
            if int(path.name.partition(".")[0]) < before:
                path.unlink()

    def metrics(self) -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        rows = []
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # the line being written when the run was killed
                continue
        return rows

    def keep_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Replaces metrics.jsonl by these rows."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        self._replace(self.path / "metrics.jsonl", lambda tmp: tmp.write_text(text))

    def append_metrics(self, rows: list[dict[str, Any]]) -> None:
        with open(self.path / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def _replace(self, path: Path, write) -> None:
        partial = path.with_name(path.name + ".partial")
        write(partial)
        os.replace(partial, path)


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:  # np.save would append .npy to a path
        np.save(file, array)
