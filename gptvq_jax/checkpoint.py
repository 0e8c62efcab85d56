"""The packed checkpoint: a directory that a run fills block by block, and a model once complete.

    manifest.json    written last and atomically: its presence means complete
    tokenizer/       as transformers saves it
    outer/           a stored tree (tree_io.py): embeddings, final norm and head
    blocks/00000/    one for each transformer block, quantized kernels packed

The manifest holds no dates, so the same run on the same machine writes the same bytes.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.tensor_io import FORMAT_VERSION, check_format_version
from gptvq_jax.tree_io import (
    Record,
    Tree,
    check_dense_dtype,
    load_tree,
    read_record,
    save_tree,
    write_json,
)
from gptvq_jax.vq_tensor import VQTensor, dequantize

FORMAT = "gptvq_jax"
_MANIFEST = "manifest.json"


class CheckpointWriter:
    """Fills a checkpoint directory; what is already there counts as finished.

    Args:
      directory: created if missing.
      dense_dtype: 'float16', 'bfloat16' or 'float32', in which dense weights are stored.

    Raises:
      ValueError: the directory cannot be written or the dtype is unknown.
    """

    def __init__(self, directory: str | os.PathLike, dense_dtype: str = "float16"):
        check_dense_dtype(dense_dtype)
        self.directory = Path(directory).absolute()
        self.dense_dtype = dense_dtype
        try:
            (self.directory / "blocks").mkdir(parents=True, exist_ok=True)
            probe = self.directory / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"cannot write to {self.directory}: {error.strerror}; choose another directory"
            ) from error

    def write_outer(self, outer: Mapping[str, Any]) -> None:
        """Stores the parameters outside the blocks, in `dense_dtype`."""
        self._reopen()
        save_tree(self.directory / "outer", outer, self.dense_dtype)

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
        tokenizer.save_pretrained(self.directory / "tokenizer")

    def finished_blocks(self) -> int:
        """Number of leading blocks that are complete on disk: where a resumed run goes on."""
        index = 0
        while read_record(_block_path(self.directory, index)) is not None:
            index += 1
        return index

    def finalize(
        self,
        config: Mapping[str, Any],
        model_config: ModelConfig,
        source_name: str,
        source_fingerprint: str,
        summary: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Writes and returns the manifest, which makes the checkpoint complete.

        Args:
          config: the run's settings, JSON types only.
          model_config: of the quantized model.
          source_name, source_fingerprint: of the float model.
          summary: anything worth keeping of the run, JSON types only.

        Raises:
          ValueError: a part is missing, or `config` or `summary` is not JSON.
        """
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": config,
            "model": model_config.to_hf(),
            "source": {"name": source_name, "fingerprint": source_fingerprint},
            **self._inventory(model_config.num_hidden_layers),
            "summary": summary or {},
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
        layers, dense = {}, {}
        for part, path in paths.items():
            record = read_record(path)
            if record is None:
                raise ValueError(f"{self.directory} lacks {part}: write it first")
            part_layers, part_dense = _listed(record, "" if part == "outer" else f"{part}/")
            layers |= part_layers
            dense |= part_dense

        quantized_bytes = sum(meta["num_bytes"] for meta in layers.values())
        weights = sum(math.prod(meta["shape"]) for meta in layers.values())
        return {
            "bits_per_value": 8 * quantized_bytes / weights if weights else None,
            "quantized_bytes": quantized_bytes,
            "dense_bytes": sum(meta["num_bytes"] for meta in dense.values()),
            "layers": layers,
            "dense": dense,
        }

    def _reopen(self) -> None:
        """A directory that is being written is not complete."""
        (self.directory / _MANIFEST).unlink(missing_ok=True)


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
        return dequantize_tree(self._load(self.directory / "outer", ""))

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
        for section, listed in zip(("layers", "dense"), _listed(record, prefix), strict=True):
            for name, meta in listed.items():
                if self.manifest[section].get(name) != meta:
                    raise ValueError(
                        f"{name} in {path} is not the one listed in {self.directory / _MANIFEST}: "
                        "it comes from another run; restore the one that belongs here"
                    )
        return tree


def read_block(directory: str | os.PathLike, index: int) -> Tree:
    """A finished block of a checkpoint that need not be complete, as `write_block` was given it.

    Raises:
      FileNotFoundError: the block is not finished.
      ValueError: it is damaged.
    """
    tree, _ = load_tree(_block_path(Path(directory).absolute(), index))
    return tree


def dequantize_tree(tree: Mapping[str, Any]) -> Tree:
    """Every leaf as a float32 host array; a VQTensor of an (out, in) weight becomes (in, out)."""

    def dense(leaf):
        return np.asarray(_kernel(leaf) if isinstance(leaf, VQTensor) else leaf, np.float32)

    flat = traverse_util.flatten_dict(tree, sep="/")
    return traverse_util.unflatten_dict({n: dense(v) for n, v in flat.items()}, sep="/")


@jax.jit
def _kernel(tensor: VQTensor) -> jax.Array:
    return dequantize(tensor).T


def _block_path(directory: Path, index: int) -> Path:
    return directory / "blocks" / f"{index:05d}"


def _listed(record: Record, prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of the manifest, `layers` and `dense`, for one stored tree."""
    layers = {prefix + n.removesuffix("/kernel"): m for n, m in record["quantized"].items()}
    return layers, {prefix + name: meta for name, meta in record["dense"].items()}
