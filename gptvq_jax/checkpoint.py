"""The packed checkpoint: a directory that a run fills block by block, and a model once complete.

    manifest.json    written last and atomically: its presence means complete
    tokenizer/       as transformers saves it
    outer/           a stored tree (tree_io.py): embeddings, final norm and head; the embedding
                     and the head dense, or rounded to int8 rows
    blocks/00000/    one for each transformer block, quantized kernels packed

The manifest holds no dates, so the same run on the same machine writes the same bytes.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from flax import traverse_util

from gptvq_jax import durable
from gptvq_jax.disk_space import FullDiskError, naming_full_disk
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.tensor_io import FORMAT_VERSION, check_format_version
from gptvq_jax.tree_io import (
    Record,
    Tree,
    check_dense_dtype,
    damage,
    is_stored,
    load_tree,
    read_record,
    save_tree,
    write_json,
)
from gptvq_jax.uniform import dequantize_rows, int8_rows
from gptvq_jax.vq_tensor import VQTensor, dequantize_compiled

FORMAT = "gptvq_jax"
EMBEDDINGS = ("dense", "int8")  # how the embedding and an untied head may be stored
_MANIFEST = "manifest.json"
_EMBEDDING_MATRICES = ("embed_tokens/embedding", "lm_head/kernel")


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

    def write_outer(self, outer: Mapping[str, Any], embeddings: str = "dense") -> Tree:
        """Stores the parameters outside the blocks.

        Args:
          outer: nested dict, float32, as a ModelSource returns it.
          embeddings: of the embedding and an untied head: 'dense' (in `dense_dtype`, as the norm
            is) or 'int8' (`uniform.int8_rows` of the (vocab, hidden) matrix).

        Returns:
          `outer`, with a VQTensor in place of each matrix that was rounded to int8.

        Raises:
          ValueError: `embeddings` is unknown, or a value is too large for its storage.
        """
        if embeddings not in EMBEDDINGS:
            raise ValueError(f"{embeddings=} must be one of {', '.join(EMBEDDINGS)}")
        if embeddings == "int8":
            outer = _int8_outer(outer)
        self._reopen()
        save_tree(self.directory / "outer", outer, self.dense_dtype)
        return outer

    def write_block(self, index: int, block: Mapping[str, Any]) -> None:
        """Stores block `index` (from 0), replacing what an interrupted run left of it.

        Args:
          block: nested dict of one decoder block; each 'kernel' is a VQTensor of the (out, in)
            weight or a dense (in, out) array.
        """
        self._reopen()
        save_tree(_block_path(self.directory, index), block, self.dense_dtype)

    def write_tokenizer(self, tokenizer: Any) -> None:
        """Stores a transformers tokenizer."""
        self._reopen()
        directory = self.directory / "tokenizer"
        with naming_full_disk(directory):
            tokenizer.save_pretrained(directory)
            durable.sync_tree(directory)

    def finished_blocks(self) -> int:
        """Number of leading blocks that are complete on disk: where a resumed run goes on.

        The sums of the last one are verified; where they are wrong it does not count, and a warning
        says so.
        """
        index = 0
        while is_stored(_block_path(self.directory, index)):
            index += 1
        if index:
            path = _block_path(self.directory, index - 1)
            wrong = damage(path)
            if wrong:
                logging.warning("block %d is made again: %s", index - 1, wrong.partition(";")[0])
                shutil.rmtree(path)
                return index - 1
        return index

    def finalize(
        self,
        config: Mapping[str, Any],
        model_config: ModelConfig,
        source_name: str,
        source_fingerprint: str,
    ) -> dict[str, Any]:
        """Writes and returns the manifest, which makes the checkpoint complete.

        Args:
          config: the run's settings, JSON types only.
          model_config: of the quantized model.
          source_name, source_fingerprint: of the float model.

        Raises:
          ValueError: a part is missing, or `config` is not JSON.
        """
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": config,
            "model": model_config.to_hf(),
            "source": {"name": source_name, "fingerprint": source_fingerprint},
            **self._inventory(model_config.num_hidden_layers),
        }
        write_json(self.directory / _MANIFEST, manifest)
        return manifest

    def _inventory(self, num_blocks: int) -> dict[str, Any]:
        """What is stored, counted from the descriptions beside the arrays."""
        if not (self.directory / "tokenizer").is_dir():
            raise ValueError(f"{self.directory} lacks the tokenizer: call write_tokenizer first")
        paths = {"outer": self.directory / "outer"}
        for index in range(num_blocks):
            paths[f"layers_{index}"] = _block_path(self.directory, index)
        sections = {"layers": {}, "embeddings": {}, "dense": {}}
        for part, path in paths.items():
            record = read_record(path)
            if record is None:
                raise ValueError(f"{self.directory} lacks {part}: write it first")
            prefix = "" if part == "outer" else f"{part}/"
            for section, listed in _listed(record, prefix).items():
                sections[section] |= listed

        sizes = {
            section: sum(meta["num_bytes"] for meta in listed.values())
            for section, listed in sections.items()
        }
        weights = sum(math.prod(meta["shape"]) for meta in sections["layers"].values())
        return {
            "bits_per_value": 8 * sizes["layers"] / weights if weights else None,
            "quantized_bytes": sizes["layers"],
            "embedding_bytes": sizes["embeddings"],
            "dense_bytes": sizes["dense"],
            **sections,
        }

    def _reopen(self) -> None:
        """A directory that is being written is not complete."""
        manifest = self.directory / _MANIFEST
        if manifest.exists():
            manifest.unlink()
            durable.sync(self.directory)


class PackedCheckpoint:
    """A complete checkpoint, readable as a float32 model (a ModelSource) or in packed form.

    Arrays are on the host. `fingerprint` is the SHA-256 of the manifest, and through the sums in it
    of every array; `manifest` is its content as a dict.

    Raises:
      FileNotFoundError: the directory is missing or the run that fills it has not finished.
      ValueError: the manifest is not ours, or of another format version.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory).absolute()
        if not self.directory.is_dir():
            raise FileNotFoundError(f"no checkpoint directory {self.directory}; check the path")
        path = self.directory / _MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: the run did not finish; rerun scripts/quantize.py with the "
                "same --workdir"
            )
        content = path.read_bytes()
        try:
            self.manifest = json.loads(content)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; quantize again") from error
        if not isinstance(self.manifest, dict) or self.manifest.get("format") != FORMAT:
            raise ValueError(f"{path} is not the manifest of a {FORMAT} checkpoint")
        check_format_version(self.manifest.get("format_version"), str(path))
        self.config = ModelConfig.from_hf(self.manifest["model"])
        self.name = self.directory.name
        self.fingerprint = hashlib.sha256(content).hexdigest()

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        from transformers import AutoTokenizer  # its import takes seconds

        return AutoTokenizer.from_pretrained(self.directory / "tokenizer")

    def outer(self) -> Tree:
        """Parameters outside the blocks, float32.

        Raises:
          ValueError: they are damaged; the message names the array.
        """
        return dequantize_tree(self.packed_outer())

    def packed_outer(self) -> Tree:
        """Parameters outside the blocks as stored: an int8 embedding or head is a VQTensor.

        Raises:
          ValueError: they are damaged; the message names the array.
        """
        return self._load(self.directory / "outer", "")

    def block(self, index: int) -> Tree:
        """Block `index` in float32, kernels (in, out): the model that the packed one stands for.

        Raises:
          ValueError: there is no such block, or it is damaged; the message names the layer.
        """
        return dequantize_tree(self.packed_block(index))

    def packed_block(self, index: int) -> Tree:
        """Block `index` with a VQTensor of the (out, in) weight as each quantized kernel.

        Raises:
          ValueError: there is no such block, or it is damaged; the message names the layer.
        """
        if not 0 <= index < self.config.num_hidden_layers:
            raise ValueError(f"block {index=} must be in 0..{self.config.num_hidden_layers - 1}")
        return self._load(_block_path(self.directory, index), f"layers_{index}/")

    def _load(self, path: Path, prefix: str) -> Tree:
        tree, record = load_tree(path)
        for section, listed in _listed(record, prefix).items():
            # Manifests written before embeddings could be int8 do not list that section.
            expected = self.manifest.get(section, {})
            for name, meta in listed.items():
                if expected.get(name) != meta:
                    raise ValueError(
                        f"{name} in {path} is not the one listed in {self.directory / _MANIFEST}: "
                        "it comes from another run; restore the one that belongs here"
                    )
        return tree


def dequantize_tree(tree: Mapping[str, Any]) -> Tree:
    """Every leaf as a float32 host array.

    A VQTensor named 'kernel', of an (out, in) weight, becomes (in, out) as in Flax; under any other
    name, such as 'embedding', it keeps its orientation.
    """

    def dense(name, leaf):
        if not isinstance(leaf, VQTensor):
            return np.asarray(leaf, np.float32)
        by_rows = name in _EMBEDDING_MATRICES
        weight = dequantize_rows(leaf) if by_rows else np.asarray(dequantize_compiled(leaf))
        return weight.T if name.endswith("kernel") else weight

    flat = traverse_util.flatten_dict(tree, sep="/")
    return traverse_util.unflatten_dict({n: dense(n, v) for n, v in flat.items()}, sep="/")


def _int8_outer(outer: Mapping[str, Any]) -> Tree:
    """`outer` with its embedding, and its head if it has one, as int8 rows (vocab, hidden)."""
    flat = traverse_util.flatten_dict(outer, sep="/")
    for name in (name for name in _EMBEDDING_MATRICES if name in flat):
        try:
            flat[name] = int8_rows(flat[name].T if name.endswith("kernel") else flat[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}; use embeddings='dense' instead") from error
    return traverse_util.unflatten_dict(flat, sep="/")


def _block_path(directory: Path, index: int) -> Path:
    return directory / "blocks" / f"{index:05d}"


def _listed(record: Record, prefix: str) -> dict[str, dict[str, Any]]:
    """The entries of the manifest for one stored tree, by section; `prefix` is '' for outer/."""
    quantized = {prefix + n.removesuffix("/kernel"): m for n, m in record["quantized"].items()}
    dense = {prefix + name: meta for name, meta in record["dense"].items()}
    return {"layers" if prefix else "embeddings": quantized, "dense": dense}
