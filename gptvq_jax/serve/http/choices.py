"""The texts of one call on their way from the engine's thread to the event loop."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from gptvq_jax.serve.answer import Answer, Piece, ScoredToken
from gptvq_jax.serve.http.calls import Options
from gptvq_jax.serve.http.errors import APIError
from gptvq_jax.serve.requests import Job


@dataclasses.dataclass
class Choice:
    """One text that a client gets."""

    prompt: tuple[int, ...]
    answer: Answer
    job: Job | None = None


@dataclasses.dataclass
class Text:
    """A choice that is complete."""

    text: str = ""
    scored: list[ScoredToken] = dataclasses.field(default_factory=list)
    end: str | None = None


class Choices:
    """The texts of a call while they are made.

    Args:
      tokenizer: of transformers.
      prompts: token ids, each for as many choices as `options` say.
      options: of the call.

    Attributes:
      choices: in the order of their index.
    """

    def __init__(self, tokenizer: Any, prompts: Sequence[tuple[int, ...]], options: Options):
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._loop, self._each = asyncio.get_running_loop(), options.choices
        self.choices = [
            Choice(prompt, Answer(tokenizer, prompt, options.stop, self._emit(index)))
            for index, prompt in enumerate(p for p in prompts for _ in range(self._each))
        ]

    def _emit(self, index: int) -> Callable[[Piece], None]:
        def emit(piece: Piece) -> None:
            try:
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))
            except RuntimeError:  # the loop is closed: nobody waits for it any more
                self.cancel()

        return emit

    def cancel(self) -> None:
        """Frees the slots of all, where they have not ended."""
        for choice in self.choices:
            if choice.job is not None:
                choice.job.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """What is new, with the index of its choice, until all have ended.

        Raises:
          APIError: the engine could not go on.
        """
        left = len(self.choices)
        while left:
            index, piece = await self._pieces.get()
            if piece.end is not None:
                left -= 1
                _check_end(piece.end)
            yield index, piece

    async def texts(self) -> list[Text]:
        """All of them, complete; raises APIError as `pieces`."""
        found = [Text() for _ in self.choices]
        async for index, piece in self.pieces():
            found[index].text += piece.text
            found[index].scored += piece.scored
            found[index].end = piece.end
        return found

    @property
    def usage(self) -> dict[str, Any]:
        """Numbers of tokens; a prompt of several choices counts once."""
        firsts = self.choices[:: self._each]
        read = sum(len(choice.prompt) for choice in firsts)
        made = sum(choice.answer.made for choice in self.choices)
        cached = sum(choice.job.reused or 0 for choice in firsts)
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _check_end(reason: str) -> None:
    """Raises APIError where a text ended for no reason of its own."""
    if reason == "closed":
        raise APIError(503, "the server stops")
    if reason not in ("stop", "length"):
        raise APIError(500, reason.removeprefix("error: "))
