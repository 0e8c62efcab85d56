"""Where a model's weights come from: one interface over every checkpoint format.

A source hands out float32 arrays in the layout of `models.llama`, one transformer block at a time,
on the device, so that memory holds one block whatever the depth of the model.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flax import traverse_util

from gptvq_jax.console.errors import printable
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.file_tensor import FileTensor
from gptvq_jax.models.on_device import Loader, Stored
from gptvq_jax.models.shapes import (
    block_shapes,
    fused_place,
    module_path,
    outer_shapes,
    stored_module,
)

_SAMPLE_BYTES = 4096


class ModelSource(Protocol):
    """A checkpoint that can be read block by block.

    Attributes:
      config: the architecture.
      name: short name for reports.
      fingerprint: identifies the weights; equal fingerprints allow an interrupted run to resume.
      tokenizer: a transformers tokenizer with a Rust backend.
      stop_tokens: ids that end a text, beside those of `config` and `tokenizer`.
    """

    config: ModelConfig
    name: str
    fingerprint: str
    tokenizer: Any
    stop_tokens: tuple[int, ...]

    def companions(self) -> dict[str, bytes]:
        """{name: content} of the files that transformers reads beside the weights; may be empty."""
        ...

    def outer(self) -> dict[str, Any]:
        """Everything outside the blocks, float32, on the host:

        {"embed_tokens": {"embedding": (vocab, hidden)}, "norm": {"scale": (hidden,)}} and, unless
        the embeddings are tied, {"lm_head": {"kernel": (hidden, vocab)}}.
        """
        ...

    def block(self, index: int) -> dict[str, Any]:
        """Block `index`, float32, on the device; kernels are (in, out), norm scales (hidden,)."""
        ...


class CheckpointSource:
    """The part of a ModelSource that does not depend on the file format.

    A subclass sets `config`, `name`, `fingerprint` and `tokenizer` and defines `_read`.
    """

    config: ModelConfig
    stop_tokens: tuple[int, ...] = ()

    def companions(self) -> dict[str, bytes]:
        """See ModelSource.companions."""
        return {}

    def _read(self, name: str) -> tuple[Stored, Path]:
        """Returns tensor `name` (Hugging Face's name), any float dtype, and the file it is in.

        It may be an array, or be read when it is sliced.
        """
        raise NotImplementedError

    def outer(self) -> dict[str, Any]:
        """See ModelSource.outer."""
        outer: dict[str, Any] = {}
        for name, shape in outer_shapes(self.config).items():
            key = name.split(".")[-2]
            array = self._read_host(name, shape)
            if key == "embed_tokens":
                outer[key] = {"embedding": array}
            else:
                outer[key] = _module(in_out(array))
        return outer

    def block(self, index: int) -> dict[str, Any]:
        """See ModelSource.block; touches only the tensors of this block."""
        leaves = {}
        with Loader() as loader:
            for name, shape in self._block_tensors(index).items():
                stored, path = self._read_shape(name, shape)
                leaves[name] = loader.load(stored, name, path)
            loader.check()
        return block_tree(leaves)

    def _block_tensors(self, index: int) -> dict[str, tuple[int, ...]]:
        """{name: shape as stored} of a block; names as if no weights were fused.

        Raises:
          ValueError: there is no such block.
        """
        if not 0 <= index < self.config.num_hidden_layers:
            raise ValueError(
                f"block {index} does not exist: the model has {self.config.num_hidden_layers}"
            )
        shapes = block_shapes(self.config.of_block(index))
        return {f"model.layers.{index}.{name}": shape for name, shape in shapes.items()}

    def _read_host(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor in float32, (out, in) as it is stored."""
        stored, path = self._read_shape(name, shape)
        array = np.asarray(stored[:], np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: tensor {name} contains NaN or Inf")
        return array

    def _read_shape(self, name: str, shape: tuple[int, ...]) -> tuple[Stored, Path]:
        home, start, rows = fused_place(self.config, name, shape)
        stored, path = self._read(home)
        check_shape(stored.shape, (rows, *shape[1:]), home, path)
        if home != name:
            stored = _rows(stored, start, shape[0])
        if stored.dtype == np.float64:  # which devices do not have here
            with np.errstate(over="ignore"):  # an infinity is found by who checks
                stored = stored[:].astype(np.float32)
        return stored, path


def in_out(array: np.ndarray) -> np.ndarray:
    """A weight as stored, (out, in), as a kernel of Flax, (in, out); a vector as it is."""
    return np.ascontiguousarray(array.T)


def block_tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of a block.

    Args:
      leaves: kernels and scales by Hugging Face's names, model.layers.7.mlp.up_proj.weight.
    """
    flat = {}
    for name, leaf in leaves.items():
        module, _, kind = name.split(".", 3)[3].rpartition(".")
        path = module_path(module).split("/")
        flat[(*path, "bias" if kind == "bias" else _kind(leaf))] = leaf
    return traverse_util.unflatten_dict(flat)


def _rows(stored: Stored, start: int, count: int) -> Stored:
    """Some rows of a tensor, not read yet if it is in a file."""
    if not isinstance(stored, FileTensor):
        return stored[start : start + count]
    offset = stored.offset + start * math.prod(stored.shape[1:]) * stored.dtype.itemsize
    return dataclasses.replace(stored, shape=(count, *stored.shape[1:]), offset=offset)


def _module(leaf: Any) -> dict[str, Any]:
    return {_kind(leaf): leaf}


def _kind(leaf: Any) -> str:
    return "scale" if len(leaf.shape) == 1 else "kernel"


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns {name: (out, in)} of the linear layers of one block."""
    shapes = block_shapes(config)
    return {name: shapes[stored_module(name) + ".weight"] for name in config.linear_layers}


def tensor_names(config: ModelConfig) -> set[str]:
    """Returns the Hugging Face names of every tensor of the model."""
    names = set(outer_shapes(config))
    for index in range(config.num_hidden_layers):
        for name, shape in block_shapes(config.of_block(index)).items():
            names.add(fused_place(config, f"model.layers.{index}.{name}", shape)[0])
    return names


def check_names(path: Path, stored: Iterable[str], expected: Iterable[str]) -> None:
    """Checks that a checkpoint holds exactly the tensors of the architecture.

    Raises:
      ValueError: a tensor is missing.
      NotImplementedError: there is one that the decoder would ignore.
    """
    stored, expected = set(stored), set(expected)
    if missing := sorted(expected - stored):
        raise ValueError(
            f"{path} lacks {len(missing)} tensor(s), the first is {missing[0]}; download or "
            "convert the model again, or mend the config, which says that it has them"
        )
    if unknown := sorted(stored - expected):
        raise NotImplementedError(
            f"{path} holds {len(unknown)} tensor(s) that its model_type does not have, "
            f"the first is {printable(unknown[0])}; convert the model again without them (merge an "
            "adapter's into its weights first), or mend the model_type"
        )


def check_shape(found: tuple[int, ...], shape: tuple[int, ...], name: str, path: Path) -> None:
    """Raises ValueError if tensor `name` of file `path` does not have the shape that it should."""
    if found != shape:
        raise ValueError(f"{path}: tensor {name} has shape {found}, the config says {shape}")


def sampled_digest(files: Iterable[tuple[Path, int, Iterable[int]]]) -> str:
    """Returns a SHA-256 over each file's name, header and the first bytes of each of its tensors.

    It tells fine-tuned variants of one model apart without reading every weight.

    Args:
      files: (path, header size in bytes, offset of each tensor from the start of the file).
    """
    digest = hashlib.sha256()
    for path, header_size, offsets in files:
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(header_size))
            for offset in sorted(offsets):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return "sampled-sha256:" + digest.hexdigest()
