"""Flags that several scripts have: which model is served, and how its tokens are drawn."""

from typing import Any

from absl import flags

from gptvq_jax.console import cli

flags.disclaim_key_flags()  # what is defined here belongs to the script that asked for it


class ModelFlags:
    """Defines --checkpoint, --model, --implementation, --dtype, --dense and --adapter."""

    def __init__(self):
        self._checkpoint = flags.DEFINE_string(
            "checkpoint", None, "Directory of a packed checkpoint."
        )
        self._model = flags.DEFINE_string(
            "model", None, "A float model instead, named as config.model is."
        )
        self._implementation = flags.DEFINE_string(
            "implementation",
            None,
            "Of products with packed weights: cpu (exact), cpu_int8 (activations rounded), xla, "
            "cuda (NVIDIA GPUs, built with nvcc), pallas_gpu, pallas_tpu, reference, or auto, the "
            "default: on a CPU cpu_int8 where it hardly changes the perplexity, on a GPU cuda "
            "where nvcc builds it and it reads the format.",
        )
        self._dtype = flags.DEFINE_enum(
            "dtype",
            "float32",
            ["float32", "bfloat16"],
            "Of activations, and of weights not packed.",
        )
        self._dense = flags.DEFINE_bool(
            "dense", False, "Dequantize the checkpoint first, to compare."
        )
        self._adapter = flags.DEFINE_string(
            "adapter",
            None,
            "Directory of a LoRA adapter in PEFT's format, kept beside the weights.",
        )

    @property
    def model(self) -> tuple[str | None, str | None]:
        """--checkpoint and --model, of which a job takes one."""
        return self._checkpoint.value, self._model.value

    @property
    def options(self) -> dict[str, Any]:
        """The others, by the names under which jobs take them."""
        return dict(
            implementation=self._implementation.value,
            dtype=self._dtype.value,
            dense=self._dense.value,
            adapter=self._adapter.value,
        )


class SamplingFlags:
    """Defines --temperature, --top_k, --top_p and --seed.

    Args:
      seed: what the seed is of.
    """

    def __init__(self, seed: str = "Of the draws."):
        self._temperature = flags.DEFINE_float(
            "temperature", 0.0, "0: the likeliest token, always."
        )
        self._top_k = flags.DEFINE_integer(
            "top_k", 0, "Draw from so many of the likeliest tokens; 0: all."
        )
        self._top_p = flags.DEFINE_float(
            "top_p", 1.0, "Draw from the fewest tokens of this probability."
        )
        self._seed = flags.DEFINE_integer("seed", 0, seed)

    @property
    def values(self) -> tuple[float, int, float]:
        """Temperature, top_k and top_p."""
        return self._temperature.value, self._top_k.value, self._top_p.value

    @property
    def seed(self) -> int:
        return self._seed.value

    def refuse_without_draws(self) -> None:
        """Raises ValueError if a flag was given that has no effect at temperature 0."""
        if self._temperature.value == 0:
            cli.refuse(
                ["top_k", "top_p", "seed"],
                "at temperature 0, which draws nothing; set --temperature=1",
            )
