"""Text up to a string that ends it: what benchmarks ask of a generator."""

from collections.abc import Callable, Sequence
from typing import Any

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.serve.generate import generate
from gptvq_jax.serve.sampling import Sampling


def generate_until(
    config: ModelConfig,
    params: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    until: Sequence[str],
    max_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    dtype: str = "float32",
    on_step: Callable[[int], None] = lambda made: None,
) -> list[str]:
    """Continues a batch of prompts, each up to the first of `until` in its text.

    Steps end when every text holds one of these strings or its model has ended it.

    Args:
      config: of the model.
      params: its tree, dense or with packed leaves.
      tokenizer: of transformers; special tokens are not part of a text.
      prompts: token ids; their lengths may differ.
      until: strings; what comes from the first of them on is cut off.
      max_tokens, sampling, seed, stop_tokens, dtype: see `generate`.
      on_step: called every few steps with the number of tokens that the longest text has.

    Returns:
      The new text of each prompt.

    Raises:
      ValueError: as `generate`.
    """
    tokens: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    strings = [string for string in until if string]

    def text_of(sequence: Sequence[int]) -> str:
        return tokenizer.decode(sequence, skip_special_tokens=True)

    def add(new: list[list[int]]) -> bool:
        for index, more in enumerate(new):
            tokens[index] += more
            if not ended[index]:
                ended[index] = any(string in text_of(tokens[index]) for string in strings)
        on_step(max(map(len, tokens)))
        return all(ended)

    generate(
        config,
        params,
        prompts,
        max_tokens=max_tokens,
        sampling=sampling,
        seed=seed,
        stop_tokens=stop_tokens,
        dtype=dtype,
        on_tokens=add,
    )
    return [_cut(text_of(sequence), strings) for sequence in tokens]


def _cut(text: str, strings: Sequence[str]) -> str:
    """A text up to the first of some strings."""
    for string in strings:
        text = text.partition(string)[0]
    return text
