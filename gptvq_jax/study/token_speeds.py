"""Tokens per second of whole generations, ours and llama.cpp's, in turn from one prompt."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.serve.generate import generate
from gptvq_jax.study.llama_cpp import Llama

Speed = Callable[[], float]  # tokens per second of one more generation


def prompt_of(config: ModelConfig, length: int) -> list[int]:
    """Tokens without a meaning: what a step costs does not depend on them."""
    return [int(token) for token in (np.arange(1, length + 1) * 7919) % config.vocab_size]


def ours(config: ModelConfig, params: Any, prompt: Sequence[int], tokens: int, dtype: str) -> Speed:
    """Of the steps behind the first token; the prompt is read before."""

    def speed() -> float:
        options = {"max_tokens": tokens, "dtype": dtype}
        return generate(config, params, [prompt], **options).tokens_per_second

    return speed


def theirs(llama: Llama, prompt: Sequence[int], tokens: int) -> Speed:
    """The same of llama.cpp."""
    return partial(_speed, llama, prompt, tokens)


def _speed(llama: Llama, prompt: Sequence[int], tokens: int) -> float:
    token = llama.read(prompt)
    start = time.perf_counter()
    for _ in range(tokens - 1):
        token = llama.step(token)
    return (tokens - 1) / (time.perf_counter() - start)


def measure(
    contenders: Mapping[str, Speed], repeats: int, on_round: Callable[[], None] = lambda: None
) -> dict[str, dict[str, Any]]:
    """All in turn, in every round.

    Args:
      contenders: by name.
      repeats: rounds.
      on_round: called after the first, which compiles, and after each of `repeats`.

    Returns:
      {name: {"tokens_per_second" (median), "quartiles"}}, and, of all but the first,
      "to_first": the median of the ratios of a round to the first's.
    """
    found = {name: np.empty(repeats) for name in contenders}
    for number in range(-1, repeats):
        for name, speed in contenders.items():
            measured = speed()
            if number >= 0:
                found[name][number] = measured
        on_round()
    first = next(iter(found.values()))
    rows = {}
    for name, measured in found.items():
        low, median, high = np.quantile(measured, (0.25, 0.5, 0.75))
        rows[name] = {
            "tokens_per_second": float(median),
            "quartiles": [float(low), float(high)],
            "to_first": float(np.median(measured / first)),
        }
    return rows
