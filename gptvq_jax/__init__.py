"""Vector quantization of large language models in JAX: GPTVQ (arXiv 2402.15319) and relatives.

    gptvq_jax.quantize("smollm2_135m_2d:3b", "runs/mine")
    model = gptvq_jax.load("runs/mine/checkpoint")

This file imports nothing that takes long: the functions import what they need when they are called.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptvq_jax.quantized_model import QuantizedModel

__version__ = "0.1.0"


def quantize(config: Any, workdir: str | os.PathLike) -> dict[str, Any]:
    """Quantizes and measures a model, as `gptvq_jax quantize` does; prints the same tables.

    Args:
      config: a ConfigDict, as from `gptvq_jax.config.default_config()`, or the name of one: a file
        that comes with the package or a path, and after a colon its argument, such as
        "smollm2_135m_2d:smoke" or "mine/config.py".
      workdir: directory for everything the run writes, the model in its `checkpoint`. A run of the
        same config that was stopped there goes on; one that is finished is only reported.

    Returns:
      The summary: "perplexity_float", "perplexity_quantized", "bits_per_value", "seconds", ...;
      "comparison" of the two models with standard errors, and the "protocol" of the text.

    Raises:
      ValueError, NotImplementedError, OSError: bad input or a full disk; one line that names the
        field or file and the fix.
    """
    from gptvq_jax.console.config_file import load_config
    from gptvq_jax.run import job

    workdir = _directory("workdir", workdir)
    if isinstance(config, str | os.PathLike):
        config = load_config(os.fspath(config))
    return job.quantize(config, workdir)


def load(checkpoint: str | os.PathLike, implementation: str = "auto") -> "QuantizedModel":
    """Opens a quantized model, to be run from its packed codes.

    Args:
      checkpoint: directory of a packed checkpoint: a run's `checkpoint`, or what
        `gptvq_jax import` made.
      implementation: of products with packed weights, see `gptvq_jax.ops.vq_matmul`.

    Returns:
      A model with `logits(tokens)`, `perplexity(text)`, `generate(prompt)` and `dequantize()`.

    Raises:
      FileNotFoundError: there is no finished checkpoint.
      ValueError: it is damaged or no path, or there is no such implementation.
    """
    checkpoint = _directory("checkpoint", checkpoint)
    from gptvq_jax.quantized_model import QuantizedModel

    return QuantizedModel(checkpoint, implementation)


def _directory(name: str, path: Any) -> str:
    """A path that somebody gave; "" would be the current directory."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not text or not isinstance(text, str):
        raise ValueError(f"{name} must be the path of a directory, as in 'runs/mine', not {path!r}")
    return text
