"""A packed checkpoint as a model in memory: what `gptvq_jax.load` returns."""

import os
from functools import cached_property
from typing import Any

import jax
import numpy as np

from gptvq_jax.adapters.adapted_source import AdaptedSource
from gptvq_jax.adapters.adapter import beside
from gptvq_jax.adapters.peft_files import open_adapter
from gptvq_jax.config import RunSettings, evaluation_settings
from gptvq_jax.data.vocabulary import check_tokens
from gptvq_jax.data.windows import begun, evaluation_windows
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import head_logits
from gptvq_jax.models.source import ModelSource
from gptvq_jax.ops.vq_matmul import check_implementation
from gptvq_jax.run import evaluate
from gptvq_jax.serve import int8_effect
from gptvq_jax.serve.generate import check_prompts, generate
from gptvq_jax.serve.loglikelihood import last_hidden
from gptvq_jax.serve.params import outer_params, packed_params
from gptvq_jax.serve.prompts import TextStream, encode_prompts
from gptvq_jax.serve.sampling import Sampling
from gptvq_jax.serve.stop_tokens import stop_tokens
from gptvq_jax.storage.checkpoint import PackedCheckpoint


class QuantizedModel:
    """A model that runs from its packed codes.

    The weights are read when they are first needed, and stay on the device, packed.

    Args:
      directory: of a packed checkpoint.
      implementation: of products with packed weights, see `ops.vq_matmul`. 'auto' may on a CPU be
        `cpu_int8`, which rounds activations (serve/int8_effect.py); a line on standard error says
        so. Perplexities are exact in any case.
      adapter: directory of an adapter in PEFT's format, kept beside the weights; None: none.

    Raises:
      FileNotFoundError, ValueError: as PackedCheckpoint and `read_adapter`; or there is no such
        implementation.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        implementation: str = "auto",
        adapter: str | os.PathLike | None = None,
    ):
        check_implementation(implementation)
        self.checkpoint = PackedCheckpoint(directory)
        self._adapter = None if adapter is None else open_adapter(adapter, self.checkpoint)
        self.implementation = implementation

    def __repr__(self) -> str:
        bits = self.checkpoint.manifest["bits_per_value"]
        return f"<QuantizedModel {self.checkpoint.directory}: {bits:.3f} bits per value>"

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.checkpoint.config

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer that came with the model."""
        return self.checkpoint.tokenizer

    def logits(self, tokens: Any) -> jax.Array:
        """Scores of every next token.

        Args:
          tokens: integers (batch, time), such as `[model.tokenizer("text")["input_ids"]]`.

        Returns:
          float32 (batch, time, vocab): at [b, t] the logits of token t + 1 after tokens 0..t.

        Raises:
          ValueError: other shapes or types, a token that the model does not have, or more of them
            than it has positions; a damaged checkpoint.
        """
        tokens = self._checked(tokens)
        x = last_hidden(self.config, self._params, tokens)
        return head_logits(self.config, outer_params(self._params), x)

    def perplexity(
        self, text: str, *, seqlen: int | None = None, batch_size: int | None = None
    ) -> float:
        """exp of the mean negative log-likelihood of a text, as `gptvq_jax evaluate` measures it.

        The text is cut into windows that do not overlap; the first token of each is not predicted,
        and what is left after the last is dropped.

        Args:
          text: at least one window long.
          seqlen: tokens per window; default: as in the run that made the checkpoint, at most the
            positions of the model.
          batch_size: windows per forward pass; default: as in that run.

        Raises:
          ValueError: the text is shorter than a window, or `seqlen` beyond the model's positions; a
            damaged checkpoint.
        """
        _check_text("text", text)
        given = {"seqlen": seqlen, "batch_size": batch_size}
        # An imported checkpoint was made without a text.
        made_with = self.checkpoint.manifest["config"].get("evaluation", {})
        settings = RunSettings(
            evaluation=evaluation_settings(
                made_with, {name: value for name, value in given.items() if value is not None}
            )
        ).evaluation
        limit = self.config.max_position_embeddings
        if seqlen is not None and seqlen > limit:
            raise ValueError(f"{seqlen=} is beyond the {limit} positions of the model; lower it")
        windows = evaluation_windows(
            self.tokenizer,
            [text],
            seqlen=min(settings.seqlen, limit),
            vocab_size=self.config.vocab_size,
        )
        if settings.bos:
            windows = begun(self.tokenizer, windows, "evaluation.bos")
        return evaluate.perplexity(self._source, windows, settings.batch_size, settings.products)

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Continues a text; returns what is new.

        Args:
          prompt: to continue.
          max_tokens: largest number of new tokens; a stop token of the model ends it earlier.
          temperature: 0: the likeliest token, always.
          top_k: draw from so many of the likeliest tokens; 0: from all.
          top_p: draw from the fewest likeliest tokens of this probability; 1: from all.
          seed: of the draws.

        Raises:
          ValueError: the prompt is empty, or too long for the model with `max_tokens` more; an
            option out of range, or without effect at temperature 0; a damaged checkpoint.
        """
        _check_text("prompt", prompt)
        sampling = Sampling(temperature, top_k, top_p)
        for name, value, default in (("top_k", top_k, 0), ("top_p", top_p, 1), ("seed", seed, 0)):
            if temperature == 0 and value != default:
                raise ValueError(
                    f"{name}={value} has no effect at temperature 0, which draws nothing; set "
                    "temperature=1"
                )
        (tokens,) = encode_prompts(self.tokenizer, [prompt])
        check_tokens(tokens, self.config.vocab_size, self.tokenizer, "the prompt")
        check_prompts(self.config, [tokens], max_tokens)  # before the weights are read
        result = generate(
            self.config,
            self._params,
            [tokens],
            max_tokens=max_tokens,
            sampling=sampling,
            seed=seed,
            stop_tokens=stop_tokens(self.checkpoint),
        )
        stream = TextStream(self.tokenizer, tokens)
        return stream.add(result.tokens[0]) + stream.finish()

    def dequantize(self) -> dict[str, Any]:
        """The weights that the packed ones stand for, as large as the float model; an adapter is
        merged into them.

        Returns:
          The float32 tree of models/llama.py, on the host: {"embed_tokens": ..., "layers_0": ...,
          "norm": ...}, kernels (in, out); `Decoder(model.config).apply({"params": tree}, tokens)`
          runs it.

        Raises:
          ValueError: the checkpoint is damaged.
        """
        depth = self.config.num_hidden_layers
        blocks = {f"layers_{index}": self._source.block(index) for index in range(depth)}
        return self.checkpoint.outer() | blocks

    @cached_property
    def _params(self) -> dict[str, Any]:
        chosen = int8_effect.choose(self.checkpoint, self.implementation)
        params = packed_params(self.checkpoint, chosen)
        if self._adapter is None:
            return params
        return beside(self._adapter, params, self.config.num_hidden_layers)

    @property
    def _source(self) -> ModelSource:
        """Block by block, dense."""
        if self._adapter is None:
            return self.checkpoint
        return AdaptedSource(self.checkpoint, self._adapter)

    def _checked(self, tokens: Any) -> np.ndarray:
        """Tokens as int32 (batch, time)."""
        try:
            array = np.asarray(tokens)
        except ValueError:  # of lists whose lengths differ
            array = None
        if (
            array is None
            or array.ndim != 2
            or not array.size
            or not np.issubdtype(array.dtype, np.integer)
        ):
            raise ValueError(
                "tokens must be integers (batch, time), every row as long, at least one token; "
                f"got {_described(tokens, array)}"
            )
        limit, vocab = self.config.max_position_embeddings, self.config.vocab_size
        if array.shape[1] > limit:
            raise ValueError(
                f"tokens have time={array.shape[1]}, beyond the {limit} positions of the model; "
                "pass fewer"
            )
        if array.min() < 0 or array.max() >= vocab:
            raise ValueError(
                f"tokens from {array.min()} to {array.max()} must be in 0..{vocab - 1}, the "
                "model's vocabulary"
            )
        return array.astype(np.int32)


def _described(tokens: Any, array: np.ndarray | None) -> str:
    """What was given in the place of tokens; `array` is what NumPy makes of it, if anything."""
    if array is None:
        lengths = [len(row) for row in tokens if hasattr(row, "__len__")]
        if len(lengths) == len(tokens) and len({*lengths}) > 1:
            return f"rows of {min(lengths)} to {max(lengths)} tokens; pad them or pass them singly"
        return "a list whose parts have different shapes"
    if isinstance(tokens, str):
        return "a text, of which model.tokenizer makes tokens"
    if not array.size:
        return f"no token, in shape {array.shape}"
    return f"{array.dtype} {array.shape}"


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text (str), not {type(text).__name__}")
