"""The work directory of a run: what a killed run needs to go on.

    config.json             the run's settings; a run with others is refused
    tokens.npy              calibration windows (n, T) int32
    activations/            00007.quantized.npy: inputs of block 7 (n, T, hidden), bfloat16 bits;
                            00007.float.npy: the float model's, where the target is asymmetric or
                            blocks are tuned towards it;
                            00007.curves.npy: likewise, while the curves are measured
    gradients/              00007.npz: weights of the calibration tokens (n, T, g) float32 for each
                            layer of block 7, where calibration.gradient_groups asks for them; until
                            they are there also 00007.inputs.npy: the float model's inputs, and
                            00007.gradient.npy: of the loss with respect to them, bfloat16 bits
    curves/                 00007.json: measured errors of the candidates for each layer of block 7,
                            where allocation.bits_per_value asks for them
    metrics.jsonl           one JSON object per line: layers, blocks, summary
    checkpoint/             the packed model; a block in it is finished

Everything is written under another name and renamed, so a kill leaves the old or the new file.
The inputs of block i + 1 are on disk before block i counts as finished.
"""

import fcntl
import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from gptvq_jax.activations import Activations, Writer, writing
from gptvq_jax.config import difference

_BACKWARD = ("inputs", "gradient")  # streams of the backward pass, which live in gradients/


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

    @property
    def _gradients(self) -> Path:
        return self.path / "gradients"

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

    def load_activations(self, block: int, stream: str = "quantized") -> Activations:
        """One stream of arrays (n, T, hidden) at the entrance of a block.

        Args:
          block: its index; the number of blocks means the head.
          stream: "quantized" or "float" for the inputs in that model, which quantization goes
            through; "curves" for the float model's while bits are allocated; "inputs" or
            "gradient" for those of the backward pass.
        """
        path = self._stream(block, stream)
        self._must_exist(path)
        return Activations(path)

    def write_activations(
        self, block: int, shape: tuple[int, ...], stream: str = "quantized"
    ) -> AbstractContextManager[Writer]:
        """A context whose Writer fills a stream; the file is there once the context ends."""
        path = self._stream(block, stream)
        path.parent.mkdir(exist_ok=True)
        return writing(path, shape)

    def has_activations(self, block: int, stream: str = "quantized") -> bool:
        return self._stream(block, stream).exists()

    def drop_activations(self, before: int, stream: str = "*") -> None:
        """Removes the inputs of blocks that will not run again; of one stream, or of all."""
        for path in self._activations.glob(f"*.{stream}.npy"):
            if int(path.name.partition(".")[0]) < before:
                path.unlink()

    def load_token_weights(self, block: int) -> dict[str, np.ndarray]:
        """{layer: weights of the calibration tokens (n, T, g) float32} of a block."""
        path = self._token_weights(block)
        self._must_exist(path)
        with np.load(path) as file:
            return dict(file)

    def save_token_weights(self, block: int, weights: dict[str, np.ndarray]) -> None:
        self._replace(self._token_weights(block), lambda tmp: _save_all(tmp, weights))

    def has_token_weights(self, block: int) -> bool:
        return self._token_weights(block).exists()

    def drop_backward(self, done: int) -> None:
        """Removes what the backward pass does not need once it is through block `done`."""
        for path in self._gradients.glob("*.npy"):
            block, stream, _ = path.name.split(".")
            # The gradient at the entrance of block `done` is where the pass goes on.
            if int(block) >= done + (stream == "gradient" and done > 0):
                path.unlink()

    def _stream(self, block: int, stream: str) -> Path:
        folder = self._gradients if stream in _BACKWARD else self._activations
        return folder / f"{block:05d}.{stream}.npy"

    def _token_weights(self, block: int) -> Path:
        return self._gradients / f"{block:05d}.npz"

    def _must_exist(self, path: Path) -> None:
        if not path.exists():
            # The backward pass is of the float model: it can be run again at any time.
            again = self._gradients if path.parent == self._gradients else self.path
            raise ValueError(
                f"{path} is missing, so the run cannot go on; "
                f"restore the file or remove {again} to start again"
            )

    def load_curves(self, block: int) -> list[dict[str, Any]]:
        """Measured errors of the candidates of a block's layers."""
        path = self._curves(block)
        self._must_exist(path)
        return json.loads(path.read_text())

    def save_curves(self, block: int, rows: list[dict[str, Any]]) -> None:
        self._replace(self._curves(block), lambda tmp: tmp.write_text(json.dumps(rows) + "\n"))

    def has_curves(self, block: int) -> bool:
        return self._curves(block).exists()

    def _curves(self, block: int) -> Path:
        return self.path / "curves" / f"{block:05d}.json"

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

    def summary(self) -> dict[str, Any] | None:
        """That of a run that was finished here, or None."""
        if not (self.checkpoint / "manifest.json").exists():
            return None
        return next((row for row in self.metrics() if row["kind"] == "summary"), None)

    def keep_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Replaces metrics.jsonl by these rows."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        self._replace(self.path / "metrics.jsonl", lambda tmp: tmp.write_text(text))

    def append_metrics(self, rows: list[dict[str, Any]]) -> None:
        with open(self.path / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def _replace(self, path: Path, write) -> None:
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        write(partial)
        os.replace(partial, path)


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:  # np.save would append .npy to a path
        np.save(file, array)


def _save_all(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:
        np.savez(file, **arrays)
