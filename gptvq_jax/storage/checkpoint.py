"""A complete packed checkpoint, read part by part (its layout: layout.py)."""

import hashlib
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from gptvq_jax.console.errors import brief
from gptvq_jax.console.json_file import read_own_object
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.core.vq_tensor import VQTensor
from gptvq_jax.models.companions import read_companions, read_stop_tokens
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.tokenizer_files import load_tokenizer
from gptvq_jax.storage.dequantize import dequantize_block, dequantize_tree
from gptvq_jax.storage.layout import FORMAT, MANIFEST, block_path
from gptvq_jax.storage.manifest import check_manifest, check_shapes, leaf_shapes, listed
from gptvq_jax.storage.tensor_io import check_format_version
from gptvq_jax.storage.tree_io import Tree, finished_record, load_arrays


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
        path = self.directory / MANIFEST
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
        return self._load(block_path(self.directory, index), f"layers_{index}/", of_block)

    def _load(self, path: Path, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Tree:
        record = finished_record(path)
        try:
            check_shapes(record, shapes)
        except ValueError as error:
            raise ValueError(
                f"{path} is not of the model in {self.directory / MANIFEST}: {error}; restore the "
                "one that belongs here"
            ) from None
        for section, metas in listed(record, prefix).items():
            # Manifests written before embeddings could be int8 do not list that section.
            expected = self.manifest.get(section, {})
            for name, meta in metas.items():
                if expected.get(name) != meta:
                    raise ValueError(
                        f"{name} in {path} is not the one listed in {self.directory / MANIFEST}: "
                        "it comes from another run; restore the one that belongs here"
                    )
        tree = load_arrays(path, record)
        if not prefix:
            _check_embeddings(tree, path)
        return tree


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
    if (inner / MANIFEST).is_file():
        return f"{directory} is the work directory of a run; pass {inner}"
    if (directory / "config.json").is_file() and not inner.is_dir():
        return "the directory holds a model of another format; pass it as --model"
    return "the run did not finish; rerun gptvq_jax quantize with the same --workdir"
