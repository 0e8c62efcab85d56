"""The job of scripts/generate.py: open a model, continue prompts, show text and figures."""

from collections.abc import Sequence
from typing import Any

from gptvq_jax.console.late_note import late_note
from gptvq_jax.data.vocabulary import check_tokens
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.serve.generate import Generation, check_prompts, generate
from gptvq_jax.serve.params import float32_bytes, implementations, memory_bytes
from gptvq_jax.serve.prompts import TextStream, encode_prompts
from gptvq_jax.serve.sampling import Sampling
from gptvq_jax.serve.served_model import ServedModel
from gptvq_jax.serve.stop_tokens import stop_tokens


def generate_text(
    checkpoint: str | None,
    model: str | None,
    prompts: Sequence[str],
    *,
    max_tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int = 0,
    chat: bool = False,
    system: str | None = None,
    implementation: str | None = None,
    dtype: str = "float32",
    dense: bool = False,
    adapter: str | None = None,
) -> list[str]:
    """Prints and returns a continuation of each prompt, and prints time and memory.

    The text of a single prompt appears as it is made, that of several at the end, numbered. Where
    compilation takes long, a line on standard error says so.

    Args:
      checkpoint, model: exactly one of them: a checkpoint directory, or a model as in config.model.
      prompts: texts, continued as one batch.
      max_tokens, sampling, seed: see `generate`.
      chat, system: see `encode_prompts`.
      implementation: of products with packed weights, see `ops.vq_matmul`; None: 'auto'.
      dtype: of the activations, and of weights that are not packed: float32 or bfloat16.
      dense: replace a checkpoint's packed weights by the dense ones that they stand for.
      adapter: directory of one in PEFT's format, kept beside the weights.

    Raises:
      ValueError, FileNotFoundError, NotImplementedError: bad input, in one line with the way out.
    """
    served = ServedModel(checkpoint, model, implementation, dense, adapter)
    source = served.source
    tokens = encode_prompts(source.tokenizer, prompts, chat, system)
    for index, prompt in enumerate(tokens):
        check_tokens(prompt, source.config.vocab_size, source.tokenizer, f"prompt {index}")
    check_prompts(source.config, tokens, max_tokens)
    params = served.params(dtype)

    streams = [TextStream(source.tokenizer, prompt) for prompt in tokens]
    texts = ["" for _ in prompts]

    def show(pieces: Sequence[str]) -> None:
        for index, piece in enumerate(pieces):
            texts[index] += piece
        if len(texts) == 1:
            print(pieces[0], end="", flush=True)

    with late_note("compiling, and reading the prompt ...") as shown:

        def on_tokens(new: list[list[int]]) -> None:
            shown()
            show([stream.add(part) for stream, part in zip(streams, new, strict=True)])

        result = generate(
            source.config,
            params,
            tokens,
            max_tokens=max_tokens,
            sampling=sampling,
            seed=seed,
            stop_tokens=stop_tokens(source),
            dtype=dtype,
            compile_first=True,
            on_tokens=on_tokens,
        )
    show([stream.finish() for stream in streams])
    print()
    if len(texts) > 1:
        print("\n".join(f"[{index}]{text}" for index, text in enumerate(texts)))
    print(figures(result, sum(map(len, tokens)), params, source.config))
    return texts


def figures(result: Generation, prompt_tokens: int, params: Any, config: ModelConfig) -> str:
    """One line: tokens and seconds, and memory of the weights."""
    packed, dense = (size / 2**20 for size in memory_bytes(params))
    products = " and ".join(implementations(params)) or "dense"
    return (
        f"prompt: {prompt_tokens} tokens in {result.prefill_seconds:.2f} s; "
        f"generated: {sum(map(len, result.tokens))} tokens, {result.tokens_per_second:.1f} "
        f"tokens/s ({products}), compiled in {result.compile_seconds:.1f} s; "
        f"weights in memory: {packed + dense:.1f} MiB, packed {packed:.1f} and dense {dense:.1f} "
        f"(all in float32: {float32_bytes(config) / 2**20:.1f} MiB)"
    )
