"""The packed checkpoint: a directory that a run fills block by block, and a model once complete.

    manifest.json    written last and atomically: its presence means complete
    tokenizer/       and the other files that transformers reads beside weights, as the source has
                     them, so that export can hand them on
    outer/           a stored tree (tree_io.py): embeddings, final norm and head; the embedding
                     and the head dense, rounded to int8 rows, or quantized as a layer is
    blocks/00000/    one for each transformer block, quantized kernels packed

The manifest holds no dates, so the same run on the same machine writes the same bytes.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util

from gptvq_jax.console.errors import brief
from gptvq_jax.console.json_file import read_own_object
from gptvq_jax.core.int8_rows import dequantize_rows, is_int8_rows
from gptvq_jax.core.quantized_tensor import QuantizedTensor, dequantize_compiled
from gptvq_jax.core.vq_tensor import VQTensor
from gptvq_jax.files import durable
from gptvq_jax.files.disk_space import FullDiskError, naming_full_disk
from gptvq_jax.models.companions import read_companions, read_stop_tokens
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.tokenizer_files import load_tokenizer, save_tokenizer
from gptvq_jax.storage.manifest import (
    KEPT_DENSE,
    check_manifest,
    check_shapes,
    counts,
    leaf_shapes,
    listed,
)
from gptvq_jax.storage.tensor_io import FORMAT_VERSION, check_format_version
from gptvq_jax.storage.tree_io import (
    Tree,
    check_dense_dtype,
    damage,
    finished_record,
    is_stored,
    load_arrays,
    read_record,
    save_tree,
    write_json,
)

FORMAT = "gptvq_jax"
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

    def write_outer(self, outer: Mapping[str, Any]) -> None:
        """Stores the parameters outside the blocks.

        Args:
          outer: nested dict, float32, as a ModelSource returns it; or with a QuantizedTensor of
            the (vocab, hidden) matrix in place of the embedding or the head.

        Raises:
          ValueError: a value is too large for its storage.
        """
        self._reopen()
        save_tree(self.directory / "outer", outer, self.dense_dtype)

    def write_block(self, index: int, block: Mapping[str, Any]) -> None:
        """Stores block `index` (from 0), replacing what an interrupted run left of it.

        Args:
          block: nested dict of one decoder block; each 'kernel' is a QuantizedTensor of the
            (out, in) weight or a dense (in, out) array.
        """
        self._reopen()
        save_tree(_block_path(self.directory, index), block, self.dense_dtype)

    def write_tokenizer(
        self, tokenizer: Any, companions: Mapping[str, bytes] | None = None
    ) -> None:
        """Stores a transformers tokenizer, and files that came with it (ModelSource.companions)."""
        self._reopen()
        directory = self.directory / "tokenizer"
        with naming_full_disk(directory):
            save_tokenizer(tokenizer, directory, companions or {})
            durable.sync_tree(directory)

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
        write_json(self.directory / _MANIFEST, manifest)
        return manifest

    def _inventory(self, num_blocks: int, kept_dense: list[str]) -> dict[str, Any]:
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
            for section, metas in listed(record, prefix).items():
                sections[section] |= metas

        kept = {KEPT_DENSE: kept_dense} if kept_dense else {}
        return {**counts(sections, kept_dense), **kept, **sections}

    def _reopen(self) -> None:
        """A directory that is being written is not complete."""
        manifest = self.directory / _MANIFEST
        if manifest.exists():
            manifest.unlink()
            durable.sync(self.directory)


class PackedCheckpoint:
    """A complete checkpoint, readable as a float32 model (a ModelSource) or in packed form.

    Arrays are on the host, but for those of `block`. `fingerprint` is the SHA-256 of the manifest,
    and through the sums in it of every array; `manifest` is its content as a dict.

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
            raise FileNotFoundError(f"{path} is missing: {_why_no_manifest(self.directory)}")
        try:
            self.manifest = read_own_object(path)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; quantize again") from None
        if self.manifest.get("format") != FORMAT:
            raise ValueError(f"{path} is not the manifest of a {FORMAT} checkpoint")
        check_format_version(self.manifest.get("format_version"), str(path))
        self.config = _model_config(self.manifest.get("model"), path)
        try:
            check_manifest(self.manifest, self.config)
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged: {error}; restore it from a copy, or quantize again"
            ) from None
        self.name = self.directory.name
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer.

        Raises:
          ValueError: it cannot be loaded.
        """
        return load_tokenizer(self.directory / "tokenizer")

    @cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """See ModelSource.stop_tokens.

        Raises:
          ValueError: generation_config.json is damaged.
        """
        return read_stop_tokens(self.directory / "tokenizer")

    def companions(self) -> dict[str, bytes]:
        """See ModelSource.companions."""
        return read_companions(self.directory / "tokenizer")

    def outer(self) -> Tree:
        """Parameters outside the blocks, float32.

        Raises:
          ValueError: they are damaged; the message names the array.
        """
        return dequantize_tree(self.packed_outer())

    def packed_outer(self) -> Tree:
        """Parameters outside the blocks as stored, with a QuantizedTensor (vocab, hidden) in
        place of an embedding or head that is not dense.

        Raises:
          ValueError: they are damaged; the message names the array.
        """
        return self._load(self.directory / "outer", "", leaf_shapes(self.config, outer=True))

    def block(self, index: int) -> Tree:
        """Block `index` in float32, kernels (in, out): the model that the packed one stands for.

        It is dequantized on the device, where it stays.

        Raises:
          ValueError: there is no such block, or it is damaged; the message names the layer.
        """
        return dequantize_block(self.packed_block(index))

    def packed_block(self, index: int) -> Tree:
        """Block `index` with a QuantizedTensor of the (out, in) weight as each quantized kernel.

        Raises:
          ValueError: there is no such block, or it is damaged; the message names the layer.
        """
        if not 0 <= index < self.config.num_hidden_layers:
            raise ValueError(f"block {index=} must be in 0..{self.config.num_hidden_layers - 1}")
        of_block = leaf_shapes(self.config.of_block(index), outer=False)
        return self._load(_block_path(self.directory, index), f"layers_{index}/", of_block)

    def _load(self, path: Path, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Tree:
        record = finished_record(path)
        try:
            check_shapes(record, shapes)
        except ValueError as error:
            raise ValueError(
                f"{path} is not of the model in {self.directory / _MANIFEST}: {error}; restore the "
                "one that belongs here"
            ) from None
        for section, metas in listed(record, prefix).items():
            # Manifests written before embeddings could be int8 do not list that section.
            expected = self.manifest.get(section, {})
            for name, meta in metas.items():
                if expected.get(name) != meta:
                    raise ValueError(
                        f"{name} in {path} is not the one listed in {self.directory / _MANIFEST}: "
                        "it comes from another run; restore the one that belongs here"
                    )
        tree = load_arrays(path, record)
        if not prefix:
            _check_embeddings(tree, path)
        return tree


def dequantize_tree(tree: Mapping[str, Any]) -> Tree:
    """Every leaf as a float32 host array.

    A quantized tensor named 'kernel', of an (out, in) weight, becomes (in, out) as in Flax; under
    any other name, such as 'embedding', it keeps its orientation.
    """

    def dense(name, leaf):
        if not isinstance(leaf, QuantizedTensor):
            return np.asarray(leaf, np.float32)
        by_rows = name in _EMBEDDING_MATRICES and is_int8_rows(leaf)
        weight = dequantize_rows(leaf) if by_rows else np.asarray(dequantize_compiled(leaf))
        return weight.T if name.endswith("kernel") else weight

    flat = traverse_util.flatten_dict(tree, sep="/")
    return traverse_util.unflatten_dict({n: dense(n, v) for n, v in flat.items()}, sep="/")


def dequantize_block(block: Mapping[str, Any]) -> Tree:
    """A packed block with every leaf in float32 on the device, kernels (in, out)."""

    def dense(leaf: QuantizedTensor | np.ndarray) -> jax.Array:
        if isinstance(leaf, QuantizedTensor):
            return dequantize_compiled(leaf).T
        return jnp.asarray(leaf, jnp.float32)

    return jax.tree.map(dense, block, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))


def _block_path(directory: Path, index: int) -> Path:
    return directory / "blocks" / f"{index:05d}"


def _model_config(model: Any, path: Path) -> ModelConfig:
    if not isinstance(model, dict):
        raise ValueError(f"{path} is damaged: model={brief(model)} must be an object")
    try:
        return ModelConfig.from_hf(model)
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"{path}: model: {error}") from None


def _check_embeddings(outer: Tree, path: Path) -> None:
    embedding = outer["embed_tokens"]["embedding"]
    if isinstance(embedding, QuantizedTensor) and not isinstance(embedding, VQTensor):
        raise NotImplementedError(
            f"{path}: embed_tokens/embedding: trellis codes have no rows that can be looked up; an "
            "embedding must be dense, int8 rows or have codebooks"
        )


def _why_no_manifest(directory: Path) -> str:
    """What a directory is instead of a finished checkpoint, and what to do."""
    inner = directory / "checkpoint"
    if (inner / _MANIFEST).is_file():
        return f"{directory} is the work directory of a run; pass {inner}"
    if (directory / "config.json").is_file() and not inner.is_dir():
        return "the directory holds a model of another format; pass it as --model"
    return "the run did not finish; rerun gptvq_jax quantize with the same --workdir"
