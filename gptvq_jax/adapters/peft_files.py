"""Adapters as Hugging Face's PEFT stores them: adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight    (rank, in)
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight    (out, rank)

A family that stores several layers as one weight (Phi-3) has one A and one B for it. Read, each
layer has the same A and its rows of B. Written, the A of the layers stand one below the other and
their B on a diagonal: the rank is the sum of theirs, and `alpha` grows with it.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from safetensors.numpy import save_file

from gptvq_jax.adapters.adapter import Adapter, LowRank
from gptvq_jax.adapters.peft_config import FILE, PeftConfig, read_config, scale
from gptvq_jax.console.errors import printable
from gptvq_jax.files import durable
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.file_tensor import read_header
from gptvq_jax.models.hf_directory import FLOAT_DTYPES, open_safetensors
from gptvq_jax.models.shapes import fused_place, stored_module
from gptvq_jax.models.source import layer_shapes
from gptvq_jax.models.stages import expert_of

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_AGAIN = "use the adapter with the model that it was trained on"


def open_adapter(path: str | os.PathLike, source: Any) -> Adapter:
    """The adapter in a directory, for a model.

    Where its file names another base, a warning says so: names are what one calls a model, and an
    adapter for the float model may well be used with the packed one.

    Args:
      path: of the directory.
      source: a ModelSource.

    Raises:
      FileNotFoundError, ValueError, NotImplementedError: see `read_adapter`.
    """
    adapter = read_adapter(path, source.config)
    manifest = getattr(source, "manifest", {})
    known = {source.name, manifest.get("source", {}).get("name"), *_directories(source)}
    known = sorted({_last_part(name) for name in known if name})
    if adapter.base_name and _last_part(adapter.base_name) not in known:
        logging.warning(
            "%s was made for the base %r, and this model is called %s",
            path,
            printable(adapter.base_name),
            " or ".join(known),
        )
    return adapter


def _directories(source: Any) -> list[str]:
    found = (getattr(source, name, None) for name in ("directory", "path"))
    return [str(path) for path in found if path is not None]


def _last_part(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()


def read_adapter(path: str | os.PathLike, config: ModelConfig) -> Adapter:
    """The adapter in a directory that PEFT or `write_adapter` wrote.

    Args:
      path: of the directory.
      config: of the model.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: one is damaged, or a layer has another shape than in the model, or does not exist.
      NotImplementedError: the adapter has something beside A and B of linear layers.
    """
    directory = Path(os.path.expanduser(path))
    if not directory.is_dir():
        raise FileNotFoundError(f"no adapter directory {directory}; check the path")
    of_file = read_config(directory)
    shapes = _module_shapes(config)
    layers: dict[str, LowRank] = {}
    for module, pair in _pairs(directory, shapes).items():
        a, b, rank = pair["A"], pair["B"], of_file.rank_of(module)
        rows = sum(count for _, (count, _) in shapes[module])
        cols = shapes[module][0][1][1]
        if (a.shape, b.shape) != ((rank, cols), (rows, rank)):
            raise ValueError(
                f"{directory / WEIGHTS}: {module} has A {a.shape} and B {b.shape}, but rank {rank} "
                f"and a layer of {rows} x {cols} need {(rank, cols)} and {(rows, rank)}; {_AGAIN}"
            )
        start = 0
        for name, (count, _) in shapes[module]:
            part = np.ascontiguousarray(b[start : start + count])
            layers[name] = LowRank(a, part, of_file.scale_of(module))
            start += count
    return Adapter(layers, of_file.base_name)


def _module_shapes(config: ModelConfig) -> dict[str, list[tuple[str, tuple[int, int]]]]:
    """Of each stored module that can have an adapter, its layers with their shapes (out, in)."""
    found: dict[str, list[tuple[str, tuple[int, int]]]] = {}
    for index in range(config.num_hidden_layers):
        of_block = config.of_block(index)
        for name, shape in layer_shapes(of_block).items():
            if expert_of(name) is None:
                found.setdefault(_home(of_block, index, name, shape), []).append(
                    (f"layers_{index}/{name}", shape)
                )
    return found


def _home(config: ModelConfig, index: int, name: str, shape: tuple[int, int]) -> str:
    """The stored module that a layer of block `index` is in."""
    own = f"model.layers.{index}.{stored_module(name)}.weight"
    return fused_place(config, own, shape)[0].removesuffix(".weight")


def _pairs(directory: Path, known: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """{module: {"A": ..., "B": ...}}, float32, of modules that the model has."""
    path = directory / WEIGHTS
    if not path.is_file() and (directory / "adapter_model.bin").is_file():
        raise ValueError(
            f"{directory} has its weights as a PyTorch pickle, adapter_model.bin; save the adapter "
            "again with PEFT's save_pretrained(DIR, safe_serialization=True)"
        )
    open_safetensors(path)
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in read_header(path)[1].items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise NotImplementedError(
                f"{path} holds {printable(key)}, which is not A or B of a linear layer; train the "
                "adapter without what it is part of"
            )
        if found[1] not in known:
            raise ValueError(
                f"{path} has an adapter of {printable(found[1])}, but the linear layers of this "
                f"model that can have one are {_summary(known)}; {_AGAIN}"
            )
        if tensor.dtype_name not in FLOAT_DTYPES or len(tensor.shape) != 2:
            raise ValueError(
                f"{path}: {key} is {tensor.dtype_name} of shape {tensor.shape}, not a matrix of "
                "floating point; train the adapter again"
            )
        array = tensor[:].astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: {key} contains NaN or Inf; train the adapter again")
        pairs.setdefault(found[1], {})[found[2]] = array
    if not pairs:
        raise ValueError(f"{path} holds no adapter; train it again")
    for module, pair in pairs.items():
        if len(pair) < 2:
            (there,) = pair
            raise ValueError(
                f"{path} has lora_{there} of {module} without its counterpart; restore the file"
            )
    return pairs


def _summary(modules: Mapping[str, Any]) -> str:
    """model.layers.0.self_attn.q_proj, ... with N in place of the block."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name, count=1) for name in modules))


def write_adapter(
    directory: Path,
    config: ModelConfig,
    adapter: Adapter,
    *,
    alpha: float,
    rslora: bool = False,
    dropout: float = 0.0,
) -> None:
    """Writes an adapter, whose layers have one rank, so that PEFT and `read_adapter` find it.

    Args:
      directory: made if it does not exist; files in it are replaced, each as a whole.
      config: of the model.
      adapter: the layers, of one rank.
      alpha, rslora: from which their scale was computed.
      dropout: with which they were trained; for those who read the file.

    Raises:
      FullDiskError: there is no room.
    """
    homes = _module_shapes(config)
    tensors, ranks, alphas = {}, {}, {}
    (rank,) = {len(layer.a) for layer in adapter.layers.values()}
    for module, parts in homes.items():
        present = [adapter.layers[name] for name, _ in parts if name in adapter.layers]
        if not present:
            continue
        whole = sum(len(layer.a) for layer in present)
        rows = np.concatenate([layer.a for layer in present])
        diagonal = np.zeros((sum(shape[0] for _, shape in parts), whole), np.float32)
        row = col = 0
        for name, shape in parts:
            if name in adapter.layers:
                layer = adapter.layers[name]
                diagonal[row : row + shape[0], col : col + len(layer.a)] = layer.b
                col += len(layer.a)
            row += shape[0]
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = rows
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = diagonal
        if whole != rank:
            ranks[module] = whole
            alphas[module] = alpha * (scale(1, rank, rslora) / scale(1, whole, rslora))
    of_file = PeftConfig(rank, alpha, rslora, ranks, alphas, adapter.base_name)
    with durable.replacing(directory / WEIGHTS, sum(a.nbytes for a in tensors.values())) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    modules = [key.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for key in tensors]
    targets = _targets([m for m in modules if not m.endswith(".weight")], config)
    text = json.dumps(of_file.to_json(targets, dropout), indent=2)
    durable.write_text(directory / FILE, text + "\n")


def _targets(modules: Sequence[str], config: ModelConfig) -> list[str]:
    """The modules by the last part of their names, where all that end so are among them."""
    ends: dict[str, set[str]] = {}
    for index in range(config.num_hidden_layers):
        of_block = config.of_block(index)
        for name, shape in layer_shapes(of_block).items():
            home = _home(of_block, index, name, shape)
            ends.setdefault(home.rpartition(".")[2], set()).add(home)
    chosen = set(modules)
    whole = sorted(end for end, homes in ends.items() if homes <= chosen)
    rest = [name for name in modules if name.rpartition(".")[2] not in whole]
    return whole + rest
