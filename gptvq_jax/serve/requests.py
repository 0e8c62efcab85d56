"""What the engine is asked, and how it answers: tokens in, tokens out; no text."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.serve.generate import check_prompts
from gptvq_jax.serve.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """How likely the model found a token, whatever it was drawn by."""

    logprob: float
    likeliest: list[tuple[int, float]]  # tokens and their log-probabilities, the likeliest first


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Fields:
      prompt: token ids.
      max_tokens: largest number of new tokens; 0: only the prompt is read.
      sampling: how tokens are drawn.
      seed: of the draws, from 0 to 2^32 - 1.
      scored: hand out a TokenScore with every new token.
      score_prompt: also those of the prompt, whose cache is then not taken from an earlier one.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    seed: int = 0
    scored: bool = False
    score_prompt: bool = False

    def check(self, config: ModelConfig, context: int) -> None:
        """Raises ValueError for what the model cannot do in so many positions."""
        if self.max_tokens == 0:
            check_prompts(config, [self.prompt], 1, context + 1)
        else:
            check_prompts(config, [self.prompt], self.max_tokens, context)


class Listener(Protocol):
    """Whom the engine tells about a request; in the thread that runs its steps."""

    def on_prompt(self, scores: Sequence[TokenScore]) -> None:
        """Of the prompt's tokens from the second on, where they are asked for."""
        ...

    def on_token(self, token: int, score: TokenScore | None) -> bool:
        """A new token; returns whether that is enough, so that no further ones are made."""
        ...

    def on_end(self, reason: str) -> None:
        """Nothing more comes.

        Args:
          reason: "stop" (a stop token, or enough), "length" (max_tokens), "cancelled", "closed"
            (the engine stops), or what went wrong, as "error: ...".
        """
        ...


class Job:
    """A request on its way; what `Engine.submit` returns.

    Attributes:
      request, listener: of it.
      reused: tokens of the prompt whose cache was there already; None before it is read.
    """

    def __init__(self, request: Request, listener: Listener, key: np.ndarray):
        self.request, self.listener = request, listener
        self.reused: int | None = None
        self.cancelled = False
        self.made = 0  # tokens so far
        self.newest = 0  # the last of them, which no layer has seen yet
        self.key = key  # uint32 (2,): of the draws to come

    def cancel(self) -> None:
        """Asks the engine to forget it; from any thread."""
        self.cancelled = True


@dataclasses.dataclass
class Counts:
    """What an engine has done since it was made."""

    steps: int = 0  # of decoding, whatever the number of slots that took part
    slot_steps: int = 0  # rows that were multiplied in these steps, used or not
    decoded: int = 0  # tokens that they made for somebody
    chunks: int = 0  # of prompts
    read: int = 0  # tokens of prompts that went through the model
    rows_read: int = 0  # the same with what the last chunks are padded by
    reused: int = 0  # tokens of prompts whose cache was there
    copies: int = 0  # of the caches of a slot, or of all to another length
