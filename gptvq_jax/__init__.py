"""Vector quantization of large language models in JAX: GPTVQ (arXiv 2402.15319) and relatives.

    gptvq_jax.quantize("smollm2_135m_2d:3b", "runs/mine")
    model = gptvq_jax.load("runs/mine/checkpoint")

and Flax models of any kind (docs/flax_models.md):

    tree = gptvq_jax.quantize(model, batches, [(".*", {"bits": 3})], params=variables)
    outputs = gptvq_jax.packed(model)(tree, inputs)

This file imports nothing that takes long: the functions import what they need when they are called.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from gptvq_jax.quantized_model import QuantizedModel

__version__ = "0.1.0"


@overload
def quantize(config: Any, workdir: str | os.PathLike) -> dict[str, Any]: ...


@overload
def quantize(
    model: Any,
    calibration: Iterable[Any],
    rules: Sequence[tuple[str, Any]],
    *,
    params: Any = None,
    inputs: str = "float",
    damping: float = 0.01,
    seed: int = 0,
) -> Any: ...


def quantize(*args: Any, **options: Any) -> Any:
    """Quantizes a language model by a config, or the layers of any Flax model by rules.

    `quantize(config, workdir)` quantizes and measures a model, as the command `gptvq_jax quantize`
    does, and prints the same tables:

      config: a ConfigDict, as from `gptvq_jax.config.default_config()`, or the name of one: a file
        that comes with the package or a path, and after a colon its argument, such as
        "smollm2_135m_2d:smoke" or "mine/config.py".
      workdir: directory for everything the run writes, the model in its `checkpoint`. A run of the
        same config that was stopped there goes on; one that is finished is only reported.

    It returns the summary: "perplexity_float", "perplexity_quantized", "bits_per_value", "seconds",
    ...; "comparison" of the two models with standard errors, and the "protocol" of the text.

    `quantize(model, calibration, rules, params=variables)` returns the variables of a Flax model
    with packed kernels where rules say so. Its arguments are those of
    `gptvq_jax.flax_tree.quantize_tree`; `packed` runs the model from what it returns.

    Raises:
      ValueError, NotImplementedError, OSError: bad input or a full disk; one line that names the
        field, file, rule or layer and the fix.
    """
    if len(args) > 2 or not options.keys() <= {"config", "workdir"}:
        from gptvq_jax.flax_tree.quantize_tree import quantize_tree

        return quantize_tree(*args, **options)
    return _quantize_by_config(*args, **options)


def _quantize_by_config(config: Any, workdir: str | os.PathLike) -> dict[str, Any]:
    from gptvq_jax.console.config_file import load_config
    from gptvq_jax.run import job

    workdir = _directory("workdir", workdir)
    if isinstance(config, str | os.PathLike):
        config = load_config(os.fspath(config))
    return job.quantize(config, workdir)


def packed(model: Any, implementation: str = "auto") -> Callable[..., Any]:
    """A Flax model, or any function of arrays, that reads packed kernels: `flax_tree.packed`.

    Args:
      model: a Linen module, an NNX module, or a function that jax.jit could take.
      implementation: of products with packed weights, see `gptvq_jax.ops.vq_matmul`.

    Returns:
      A function of (variables, *inputs, **options), for jax.jit.

    Raises:
      ValueError: the model is none of these, or there is no such implementation.
    """
    from gptvq_jax.flax_tree import run_packed

    return run_packed.packed(model, implementation)


def load(
    checkpoint: str | os.PathLike,
    implementation: str = "auto",
    adapter: str | os.PathLike | None = None,
) -> "QuantizedModel":
    """Opens a quantized model, to be run from its packed codes.

    Args:
      checkpoint: directory of a packed checkpoint: a run's `checkpoint`, or what
        `gptvq_jax import` made.
      implementation: of products with packed weights, see `gptvq_jax.ops.vq_matmul`.
      adapter: directory of a LoRA adapter in PEFT's format, kept beside the weights; None: none.

    Returns:
      A model with `logits(tokens)`, `perplexity(text)`, `generate(prompt)` and `dequantize()`.

    Raises:
      FileNotFoundError: there is no finished checkpoint, or no adapter.
      ValueError: one is damaged, no path, or not of the other; there is no such implementation.
      NotImplementedError: the adapter is of a kind that is not supported.
    """
    checkpoint = _directory("checkpoint", checkpoint)
    adapter = None if adapter is None else _directory("adapter", adapter)
    from gptvq_jax.quantized_model import QuantizedModel

    return QuantizedModel(checkpoint, implementation, adapter)


def _directory(name: str, path: Any) -> str:
    """A path that somebody gave; "" would be the current directory."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not text or not isinstance(text, str):
        raise ValueError(f"{name} must be the path of a directory, as in 'runs/mine', not {path!r}")
    return text
