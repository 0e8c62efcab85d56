"""The work directory of a run: what a killed run needs to go on.

    config.json             the run's settings; a run with others is refused
    command.txt             the command line that began it or last went on with it, if there was one
    tokens.npy              calibration windows (n, T) int32, at the end those that are held out
    held_out.npy            windows of the text of the evaluation (n, T) int32
    activations/            streams (stream_files.py) (n, T, hidden), bfloat16 bits, at point 7,
                            the entrance of block 7: 00007.quantized.npy of the quantized model,
                            00007.float.npy of the float one, 00007.gradient.npy of the loss with
                            respect to that; 00007.middle.npy of the float one between the halves of
                            block 7; 00007.half.npy and 00007.inner.npy while block 7 is quantized
    gradients/              00007.npz: weights of the calibration tokens (n, T, g) float32 for each
                            layer of block 7, where calibration.gradient_groups asks for them
    curves/                 00007.json: measured errors of the candidates for each layer of block 7,
                            where allocation.bits_per_value asks for them
    moments/                00007.npz: of block 7 in the float model, where another run has made
                            them (float_moments.py); none where calibration.statistics is set
    evaluation/             the held-out text: float/ and quantized/ have its streams by model
                            (float32), the last one 00030.outputs-DIGEST.npy, until the summary is
                            written; figures.npy, which stays, has of each predicted token what
                            core/divergence.py calls FIGURES (n, T - 1, 4) float32
    tuning/                 of the whole model: tokens.npy, windows (n, T), at the end those held
                            out; what the float model's last block leaves of them, and states
                            (tune_state.py), until the summary is written
    metrics.jsonl           one JSON object per line: layers, blocks, steps of tuning, summary
    untuned/                where tune.model is on, the packed model as it was quantized
    checkpoint/             the packed model; a block in it is finished

Everything is written under another name and renamed once it is on the disk (durable.py), so that a
kill or a power loss leaves the old or the new file. The inputs of block i + 1 are on disk before
block i counts as finished, and those of block i stay until block i + 1 does: where block i is found
damaged, it is made again.
"""

import fcntl
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from gptvq_jax.config import difference
from gptvq_jax.console.errors import first_line
from gptvq_jax.files import durable, sharing
from gptvq_jax.files.disk_space import FullDiskError, check_room, directory_bytes, naming_full_disk
from gptvq_jax.run.activations import Activations
from gptvq_jax.run.stream_files import StreamFiles

# Of rows of metrics.jsonl: the tuning of the whole model, as it goes on and at its end.
TUNE_KINDS = ("tune", "codes", "tuned", "moved")

# Files that no run writes beside its own.
_OF_OTHERS = {
    "sweep.json": "the directory of a sweep",
    "manifest.json": "a packed checkpoint",
    "model.safetensors": "a model",
    "model.safetensors.index.json": "a model",
}


class WorkDir:
    """Opens (or makes) a work directory and locks it for this process until it is closed.

    Raises:
      ValueError: it cannot be written, another process uses it, or it belongs to another config or
        to something else, such as a sweep.
      FullDiskError: there is no room for anything.
    """

    def __init__(self, path: str | Path, config: dict[str, Any]):
        self.path = Path(path)
        self._tunes = bool(config.get("tune", {}).get("model"))
        self._lock = None
        sharing.by_writer(lambda: self._open(config))

    def _open(self, config: dict[str, Any]) -> None:
        self._check_kind()
        try:
            with naming_full_disk(self.path):
                durable.make_directory(self._activations)
                self._lock = open(self.path / "lock", "w")  # noqa: SIM115 - held until close
        except FullDiskError:
            raise
        except OSError as error:
            raise ValueError(
                f"cannot write to the work directory {self.path} ({error.strerror}); "
                "pass another one with --workdir"
            ) from error
        try:
            self._claim()
            self._check_config(config)
            self._drop_partial()
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            # A run that was refused for its text, say, must not be in the way of the corrected one.
            if kind is not None and self._lock is not None and not self.begun():
                (self.path / "config.json").unlink(missing_ok=True)
        finally:
            self.close()

    def close(self) -> None:
        """Lets other processes use the directory."""
        if self._lock is not None:
            self._lock.close()

    def _claim(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"another process is using the work directory {self.path}; wait for it or pass "
                "another --workdir"
            ) from error

    def _check_kind(self) -> None:
        """Refuses what is another thing's directory, before a file is written there."""
        for name, what in _OF_OTHERS.items():
            if (self.path / name).exists():
                raise ValueError(
                    f"{self.path} is {what}, which {name} in it says, and no work directory of a "
                    "run; pass another --workdir"
                )

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def quantized(self) -> Path:
        """The packed model before it is tuned as a whole; where it is not, the checkpoint."""
        return self.path / "untuned" if self._tunes else self.checkpoint

    @property
    def tuning(self) -> Path:
        """What the tuning of the whole model needs to go on."""
        return self.path / "tuning"

    def drop_tuning(self) -> None:
        """Forgets it."""
        sharing.by_writer(lambda: _remove(self.tuning))

    @property
    def _activations(self) -> Path:
        return self.path / "activations"

    @property
    def streams(self) -> "Streams":
        """What goes from block to block."""
        return Streams(self)

    def _check_config(self, config: dict[str, Any]) -> None:
        path = self.path / "config.json"
        new = json.loads(json.dumps(config))
        if not path.exists():
            if self.checkpoint.exists():
                raise ValueError(
                    f"{self.checkpoint} exists but {path} does not: this is no work directory of "
                    "a run; pass another --workdir"
                )
            durable.write_text(path, json.dumps(new, indent=2) + "\n")
            return
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(old, dict):
                raise ValueError(f"it holds a {type(old).__name__}")
        except ValueError as error:
            raise ValueError(
                f"{path} is not the config of a run ({first_line(error)}); restore it, or pass "
                "another --workdir"
            ) from error
        changed = difference(old, new)
        if changed:
            raise ValueError(
                f"{self.path} was started with another config: {'; '.join(changed)}. "
                "Restore the config to resume, or pass another --workdir"
            )

    def begun(self) -> bool:
        """Whether anything is there that was made with the config."""
        made = ("tokens.npy", "checkpoint", "untuned", "gradients", "curves", "activations/*")
        made += ("tuning", "metrics.jsonl")
        return any(any(self.path.glob(pattern)) for pattern in made)

    def _drop_partial(self) -> None:
        """Removes what a killed process was writing."""
        for folder in (
            self.path,
            self._activations,
            self.path / "gradients",
            self._curves(0).parent,
            self._evaluation,
            self.tuning,
        ):
            durable.drop_partial(folder)

    def evaluation(self, model: str) -> StreamFiles:
        """Streams of the held-out text in the "float" or the "quantized" model, and its outputs."""
        return StreamFiles.opened(self._evaluation / model)

    @property
    def token_figures(self) -> Path:
        """What both models say of each token of the held-out text."""
        return self._evaluation / "figures.npy"

    def drop_evaluations(self) -> None:
        """Forgets the streams of the held-out text; other names of their files stay."""
        for model in ("float", "quantized"):
            sharing.by_writer(lambda of=self._evaluation / model: _remove(of))

    @property
    def _evaluation(self) -> Path:
        return self.path / "evaluation"

    def check_room(self, num_bytes: int, *kept: str) -> None:
        """Checks, before a pass, that there is room for what it will write.

        Args:
          num_bytes: most bytes that the files below will have at any time of the pass.
          kept: patterns of these files, such as "gradients/*"; what is there needs no room.

        Raises:
          FullDiskError: the disk has less.
        """
        present = sum(directory_bytes(self.path, pattern) for pattern in kept)
        check_room(self.path, num_bytes - present)

    def note_command(self, command: str) -> None:
        """Keeps the command line, for those who read the results."""
        durable.write_text(self.path / "command.txt", command + "\n")

    def load_tokens(self, name: str = "tokens") -> np.ndarray | None:
        """Windows of an earlier start, or None: "tokens" to calibrate on, "held_out", or
        "tuning/tokens".
        """
        path = self.path / f"{name}.npy"
        if not path.exists():
            return None
        try:
            with open(path, "rb") as file:
                return np.load(file)
        except (ValueError, EOFError, OSError) as error:
            logging.warning("%s is damaged and made again: %s", path, first_line(error))
            return None

    def save_tokens(self, tokens: np.ndarray, name: str = "tokens") -> None:
        replacing = durable.replacing(self.path / f"{name}.npy", tokens.nbytes)
        with replacing as partial, open(partial, "wb") as file:  # np.save would append .npy
            np.save(file, tokens)

    def load_token_weights(self, block: int) -> dict[str, np.ndarray]:
        """{layer: weights of the calibration tokens (n, T, g) float32} of a block."""
        path = self._token_weights(block)
        self._must_exist(path)
        try:
            with open(path, "rb") as file, np.load(file) as arrays:
                return dict(arrays)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile, AttributeError) as error:
            raise self._lost(path, f"is damaged: {first_line(error)}") from error

    def save_token_weights(self, block: int, weights: dict[str, np.ndarray]) -> None:
        size = sum(array.nbytes for array in weights.values())
        replacing = durable.replacing(self._token_weights(block), size)
        with replacing as partial, open(partial, "wb") as file:
            np.savez(file, **weights)

    def has_token_weights(self, block: int) -> bool:
        return self._token_weights(block).exists()

    def _token_weights(self, block: int) -> Path:
        return self.path / "gradients" / f"{block:05d}.npz"

    def _must_exist(self, path: Path) -> None:
        if not path.exists():
            raise self._lost(path, "is missing")

    def _lost(self, path: Path, what: str, again: Path | None = None) -> ValueError:
        """Says what to remove, so that the least is made again."""
        return ValueError(
            f"{path} {what}, so the run cannot go on; restore the file, or remove "
            f"{again or path.parent} to start again from there with the same command"
        )

    def load_curves(self, block: int) -> list[dict[str, Any]]:
        """Measured errors of the candidates of a block's layers."""
        path = self._curves(block)
        self._must_exist(path)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise self._lost(path, f"is damaged: {first_line(error)}") from error

    def save_curves(self, block: int, rows: list[dict[str, Any]]) -> None:
        durable.write_text(self._curves(block), json.dumps(rows) + "\n")

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
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the line being written when the run was killed
                continue
            if isinstance(row, dict) and "kind" in row:
                rows.append(row)
        return rows

    def summary(self) -> dict[str, Any] | None:
        """That of a run that was finished here, or None."""
        if not (self.checkpoint / "manifest.json").exists():
            return None
        return next((row for row in self.metrics() if row["kind"] == "summary"), None)

    def keep_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Replaces metrics.jsonl by these rows."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        durable.write_text(self.path / "metrics.jsonl", text)

    def append_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Adds rows, all of them or none."""
        durable.append_lines(self.path / "metrics.jsonl", rows)


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


class Streams(StreamFiles):
    """The streams of a run; what is lost says what to remove."""

    def __init__(self, workdir: WorkDir):
        super().__init__(workdir.path / "activations")
        self._workdir = workdir

    def read(self, stream: str, point: int) -> Activations:
        path = self.path(stream, point)
        try:
            return super().read(stream, point)
        except FileNotFoundError:
            what = "is missing"
        except ValueError as error:
            what = first_line(error).removeprefix(f"{path} ")
        # Each pass looks for what it needs, and starts again where that is not there.
        again = {
            "quantized": self._workdir.quantized,
            "gradient": self.directory / "*.gradient.npy",
        }
        raise self._workdir._lost(path, what, again.get(stream, self.directory / "*.float.npy"))
