"""Float models in Hugging Face's layout."""

import functools
from pathlib import Path
from typing import Any

from gptvq_jax.models.file_tensor import FileTensor
from gptvq_jax.models.hf_directory import HFDirectory
from gptvq_jax.models.source import CheckpointSource, tensor_names


class DirectorySource(CheckpointSource):
    """The part of a ModelSource that any directory in Hugging Face's layout has.

    A subclass sets `_directory`.
    """

    _directory: HFDirectory

    @functools.cached_property
    def tokenizer(self) -> Any:
        """See HFDirectory.tokenizer."""
        return self._directory.tokenizer()

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """See ModelSource.stop_tokens."""
        return self._directory.stop_tokens

    def companions(self) -> dict[str, bytes]:
        """See ModelSource.companions."""
        return self._directory.companions()

    def _read(self, name: str) -> tuple[FileTensor, Path]:
        return self._directory.read(name)


class HFSource(DirectorySource):
    """A ModelSource over a directory in Hugging Face's layout.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is truncated, or a tensor is missing.
      NotImplementedError: the decoder lacks this architecture.
    """

    def __init__(self, directory: HFDirectory):
        self._directory = directory
        self.name = directory.name
        self.config = directory.model_config()
        self.fingerprint = directory.fingerprint
        directory.check_tensors(self.config, tensor_names(self.config))
