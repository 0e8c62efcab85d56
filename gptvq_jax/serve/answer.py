"""The text of a request as it is made: whole characters, up to a string that ends it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from gptvq_jax.serve.prompts import TextStream
from gptvq_jax.serve.requests import TokenScore


@dataclasses.dataclass(frozen=True)
class ScoredToken:
    """A token of a text, with its probability."""

    token: int
    offset: int  # characters of the text before it
    score: TokenScore | None  # None: of a prompt's first token


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is new since the piece before."""

    text: str
    scored: tuple[ScoredToken, ...] = ()  # where probabilities are asked for
    end: str | None = None  # of the last piece: why, as `Listener.on_end` says


class StopStrings:
    """Cuts a text that grows at the first of some strings, of which nothing is let through.

    Args:
      strings: not empty ones.

    Attributes:
      found: whether the text has ended.
    """

    def __init__(self, strings: Sequence[str]):
        self._strings, self._held = tuple(strings), ""
        self.found = False

    def add(self, text: str) -> str:
        """What is certainly before any of the strings, and was not let through before."""
        if self.found:
            return ""
        text = self._held + text
        at = min((i for i in map(text.find, self._strings) if i >= 0), default=None)
        if at is not None:
            self.found, self._held = True, ""
            return text[:at]
        held = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Characters at the end of a text with which a string that is not in it may begin."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)


class Answer:
    """A listener of the engine that makes text of its tokens.

    Args:
      tokenizer: of transformers.
      prompt: tokens before the text.
      stop: strings, each of which ends the text and is not part of it.
      emit: called with every piece, the last one included, in the thread of the engine.

    Attributes:
      made: tokens of the answer, those of a stop string included.
      prompt_scores: of the prompt's tokens from the second on, once they are known.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        stop: Sequence[str],
        emit: Callable[[Piece], None],
    ):
        self._stream, self._stop, self._emit = (
            TextStream(tokenizer, prompt),
            StopStrings(stop),
            emit,
        )
        self._known = 0  # characters of the text, with those held back
        self._shown = 0  # of those handed out
        self._scored: list[ScoredToken] = []  # of what is held back
        self.made = 0
        self.prompt_scores: Sequence[TokenScore] = ()

    def on_prompt(self, scores: Sequence[TokenScore]) -> None:
        self.prompt_scores = scores

    def on_token(self, token: int, score: TokenScore | None) -> bool:
        self.made += 1
        if score is not None:
            self._scored.append(ScoredToken(token, self._known, score))
        new = self._stream.add([token])
        self._known += len(new)
        visible = self._stop.add(new)
        if visible:
            self._emit(self._piece(visible))
        return self._stop.found

    def on_end(self, reason: str) -> None:
        text = self._stop.add(self._stream.finish()) + self._stop.finish()
        self._emit(self._piece(text, reason))

    def _piece(self, text: str, end: str | None = None) -> Piece:
        self._shown += len(text)
        whole = end is not None and not self._stop.found
        ready = [s for s in self._scored if whole or s.offset < self._shown]
        self._scored = self._scored[len(ready) :]
        return Piece(text, tuple(ready), end)
