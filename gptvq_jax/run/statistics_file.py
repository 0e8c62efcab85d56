"""Second moments of what a float model's layers read, all blocks in one file that others add to.

A file is a .npz, which numpy.load reads:

    record                                 JSON: "format", "weights" (fingerprint of the model),
                                           "model" (its name), "blocks", and "parts": a
                                           text.calibration_protocol for each run that was added
    00007 KIND LAYER 0 total               of block 7 (C, C) float32, the sum over tokens of x x^T,
                                           of which the upper triangle counts
    00007 KIND LAYER 0 count               () float32, the tokens; of an expert, where both weigh
                                           tokens by their squared router weights, the sum of these
    00007 KIND LAYER 0 tokens              () int32, of an expert, the tokens that it got

KIND is "fitted" or "held_out", LAYER the first of the layers that read the same x. Sums of
different texts add up, and so do those of what is held out, which stands at the same places of a
text whatever the seed.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptvq_jax.console.errors import first_line
from gptvq_jax.files import durable
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.source import layer_shapes
from gptvq_jax.run.float_moments import from_arrays
from gptvq_jax.run.held_out import Sums
from gptvq_jax.run.text import calibration_text

FORMAT = 1
_FIELDS = {"format": int, "weights": str, "model": str, "blocks": int, "parts": list}
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, zipfile.BadZipFile)


class Statistics:
    """Reads a file, a block at a time.

    Attributes:
      path: of the file.
      record: its record.
      digest: of its content; equal digests are equal statistics.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is no such file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no such file: {path}; make it with scripts/calibrate.py")
        try:
            with zipfile.ZipFile(self.path) as file:
                members = [(i.filename, i.CRC, i.file_size) for i in file.infolist()]
            with np.load(self.path) as arrays:
                self.record = json.loads(str(arrays["record"]))
            for name, kind in _FIELDS.items():
                if type(self.record[name]) is not kind:
                    raise ValueError(f"{name} is no {kind.__name__}")
            self._check_parts()
        except _DAMAGE as error:
            raise self._not_statistics(error) from error
        if self.record["format"] != FORMAT:
            raise ValueError(
                f"{path} has format {self.record['format']}, this version reads {FORMAT}; make it "
                "again with scripts/calibrate.py"
            )
        self.digest = hashlib.sha256(json.dumps(members).encode()).hexdigest()

    def _check_parts(self) -> None:
        """Raises KeyError or TypeError where a part is none."""
        for part in self.record["parts"]:
            _ = part["context"] + part["seed"]
            for text in part["texts"]:
                _ = text["windows"] + text["held_out_windows"], text["dataset"] + ""

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """Sums and counts of a block, as float_moments.to_arrays names them.

        Raises:
          ValueError: the file is damaged.
        """
        start = f"{index:05d} "
        try:
            with np.load(self.path) as arrays:
                names = [name for name in arrays.files if name.startswith(start)]
                return {name.removeprefix(start): arrays[name] for name in names}
        except _DAMAGE as error:
            raise self._not_statistics(error) from error

    def sums(self, index: int, config: ModelConfig) -> Sums:
        """Those of a block.

        Raises:
          ValueError: they are missing, damaged or of other shapes.
        """
        arrays = self.arrays(index)
        shapes, kinds = layer_shapes(config), ["fitted", "held_out"][: 1 + self.has_held_out]
        for kind in kinds:
            for name in (group[0] for group in config.linear_groups):
                total = arrays.get(f"{kind} {name} 0 total")
                count = arrays.get(f"{kind} {name} 0 count")
                cols = shapes[name][1]
                if total is None or count is None or total.shape != (cols, cols) or count.shape:
                    raise self._not_statistics(f"block {index} has no {kind} sum of {name}")
        try:
            return from_arrays(arrays)
        except _DAMAGE as error:
            raise self._not_statistics(error) from error

    @property
    def has_held_out(self) -> bool:
        """Whether there are sums of held-out windows."""
        parts = self.record["parts"]
        return any(text["held_out_windows"] for part in parts for text in part["texts"])

    def check(self, name: str, weights: str, blocks: int) -> None:
        """Checks that the file is of a model.

        Args:
          name: of the model, for the message.
          weights: its fingerprint.
          blocks: how many are needed.

        Raises:
          ValueError: it is of another one, or of fewer blocks.
        """
        record = self.record
        if record["weights"] != weights:
            raise ValueError(
                f"{self.path} has statistics of other weights ({record['model']}) than those of "
                f"{name}; make them with scripts/calibrate.py --config.model=..."
            )
        if record["blocks"] < blocks:
            raise ValueError(
                f"{self.path} has statistics of {record['blocks']} blocks, {blocks} are needed; "
                "make them with --config.num_blocks=0, or set num_blocks"
            )

    def _not_statistics(self, why: Exception | str) -> ValueError:
        reason = why if isinstance(why, str) else first_line(why)
        return ValueError(
            f"{self.path} is damaged or no file of scripts/calibrate.py ({reason}); make it again"
        )


def statistics_text(record: dict[str, Any]) -> str:
    """What text the statistics are of."""
    return " and ".join(calibration_text(part) for part in record["parts"])


def write(
    path: Path, record: Mapping[str, Any], blocks: Iterable[Mapping[str, np.ndarray]], size: int
) -> None:
    """Writes a file; a block is in memory at a time.

    Args:
      path: of the file; one that is there is replaced.
      record: all but its format.
      blocks: as `Statistics.arrays` gives them.
      size: bytes of all arrays.
    """
    record = np.array(json.dumps({"format": FORMAT, **record}))
    with (
        durable.replacing(path, size) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as file,
    ):
        for name, array in _members(record, blocks):
            # Without a date: equal statistics are equal files.
            with file.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _members(
    record: np.ndarray, blocks: Iterable[Mapping[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    yield "record", record
    for index, arrays in enumerate(blocks):
        for name, array in arrays.items():
            yield f"{index:05d} {name}", array
