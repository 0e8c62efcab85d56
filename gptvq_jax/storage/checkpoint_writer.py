"""Fills the directory of a packed checkpoint, block by block."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from gptvq_jax.files import durable, sharing
from gptvq_jax.files.disk_space import FullDiskError, naming_full_disk
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.tokenizer_files import save_tokenizer
from gptvq_jax.storage.layout import FORMAT, MANIFEST, block_path
from gptvq_jax.storage.manifest import KEPT_DENSE, counts, listed
from gptvq_jax.storage.tensor_io import FORMAT_VERSION
from gptvq_jax.storage.tree_io import (
    check_dense_dtype,
    damage,
    is_stored,
    read_record,
    save_tree,
    write_json,
)


class CheckpointWriter:
    """Fills a checkpoint directory; what is already there counts as finished.

    Args:
      directory: created if missing.
      dense_dtype: 'float16', 'bfloat16' or 'float32', in which dense weights are stored.

    Raises:
      ValueError: the directory cannot be written or the dtype is unknown.
      FullDiskError: as from every method that writes.
    """

    def __init__(self, directory: str | os.PathLike, dense_dtype: str = "float16"):
        check_dense_dtype(dense_dtype)
        self.directory = Path(directory).absolute()
        self.dense_dtype = dense_dtype
        sharing.by_writer(self._open)

    def _open(self) -> None:
        try:
            with naming_full_disk(self.directory):
                durable.make_directory(self.directory / "blocks")
                probe = self.directory / ".writable"
                probe.touch()
                probe.unlink()
        except FullDiskError:
            raise
        except OSError as error:
            raise ValueError(
                f"cannot write to {self.directory}: {error.strerror}; choose another directory"
            ) from error

    def write_outer(self, outer: Mapping[str, Any]) -> None:
        """Stores the parameters outside the blocks.

        Args:
          outer: nested dict, float32, as a ModelSource returns it; or with a QuantizedTensor of
            the (vocab, hidden) matrix in place of the embedding or the head.

        Raises:
          ValueError: a value is too large for its storage.
        """
        self._save(self.directory / "outer", outer)

    def write_block(self, index: int, block: Mapping[str, Any]) -> None:
        """Stores block `index` (from 0), replacing what an interrupted run left of it.

        Args:
          block: nested dict of one decoder block; each 'kernel' is a QuantizedTensor of the
            (out, in) weight or a dense (in, out) array.
        """
        self._save(block_path(self.directory, index), block)

    def _save(self, path: Path, tree: Mapping[str, Any]) -> None:
        sharing.by_writer(self._reopen)
        save_tree(path, tree, self.dense_dtype)

    def write_tokenizer(
        self, tokenizer: Any, companions: Mapping[str, bytes] | None = None
    ) -> None:
        """Stores a transformers tokenizer, and files that came with it (ModelSource.companions)."""

        def save() -> None:
            self._reopen()
            directory = self.directory / "tokenizer"
            with naming_full_disk(directory):
                save_tokenizer(tokenizer, directory, companions or {})
                durable.sync_tree(directory)

        sharing.by_writer(save)

    def has_outer(self) -> bool:
        """Whether `write_outer` has come to its end; a warning says if its sums are wrong now."""
        path = self.directory / "outer"
        wrong = damage(path) if is_stored(path) else None
        if wrong:
            logging.warning("outer/ is stored again: %s", wrong.partition(";")[0])
        return is_stored(path) and not wrong

    def finished_blocks(self) -> int:
        """Number of leading blocks that are complete on disk: where a resumed run goes on.

        The sums of the last one are verified; where they are wrong it does not count, and a warning
        says so.
        """
        index = 0
        while is_stored(block_path(self.directory, index)):
            index += 1
        if index:
            path = block_path(self.directory, index - 1)
            wrong = damage(path)
            if wrong:
                logging.warning("block %d is made again: %s", index - 1, wrong.partition(";")[0])
                sharing.by_writer(lambda: shutil.rmtree(path))
                return index - 1
        return index

    def finalize(
        self,
        config: Mapping[str, Any],
        model_config: ModelConfig,
        source_name: str,
        source_fingerprint: str,
        kept_dense: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Writes and returns the manifest, which makes the checkpoint complete.

        Args:
          config: the run's settings, JSON types only.
          model_config: of the quantized model.
          source_name, source_fingerprint: of the float model.
          kept_dense: names of dense layers that count among the bits per value, as in
            "layers_0/mlp/up_proj".

        Raises:
          ValueError: a part is missing, or `config` is not JSON.
        """
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": config,
            "model": model_config.to_hf(),
            "source": {"name": source_name, "fingerprint": source_fingerprint},
            **self._inventory(model_config.num_hidden_layers, list(kept_dense)),
        }
        write_json(self.directory / MANIFEST, manifest)
        return manifest

    def _inventory(self, num_blocks: int, kept_dense: list[str]) -> dict[str, Any]:
        """What is stored, counted from the descriptions beside the arrays."""
        if not (self.directory / "tokenizer").is_dir():
            raise ValueError(f"{self.directory} lacks the tokenizer: call write_tokenizer first")
        paths = {"outer": self.directory / "outer"}
        for index in range(num_blocks):
            paths[f"layers_{index}"] = block_path(self.directory, index)
        sections = {"layers": {}, "embeddings": {}, "dense": {}}
        for part, path in paths.items():
            record = read_record(path)
            if record is None:
                raise ValueError(f"{self.directory} lacks {part}: write it first")
            prefix = "" if part == "outer" else f"{part}/"
            for section, metas in listed(record, prefix).items():
                sections[section] |= metas

        kept = {KEPT_DENSE: kept_dense} if kept_dense else {}
        return {**counts(sections, kept_dense), **kept, **sections}

    def _reopen(self) -> None:
        """A directory that is being written is not complete."""
        manifest = self.directory / MANIFEST
        if manifest.exists():
            manifest.unlink()
            durable.sync(self.directory)
