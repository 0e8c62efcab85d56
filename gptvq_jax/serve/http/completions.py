"""The objects that /v1/completions answers with."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from gptvq_jax.serve.answer import Piece, ScoredToken
from gptvq_jax.serve.http.calls import CompletionCall
from gptvq_jax.serve.http.choices import Choices
from gptvq_jax.serve.http.service import Service
from gptvq_jax.serve.http.token_text import token_text
from gptvq_jax.serve.prompts import TextStream


class Completions:
    """Answers one call.

    Args:
      service: that makes its texts.
      call: what is asked.
      choices: the texts.
    """

    def __init__(self, service: Service, call: CompletionCall, choices: Choices):
        self._tokenizer, self._call, self._choices = service.tokenizer, call, choices
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
        }

    async def answer(self) -> dict[str, Any]:
        """The whole answer; raises APIError."""
        chosen = []
        for index, found in enumerate(await self._choices.texts()):
            text, tokens = found.text, found.scored
            if self._call.echo:
                text, tokens = self._with_prompt(index, text, tokens)
            chosen.append(self._choice(index, text, tokens, found.end))
        return {**self._head, "choices": chosen, "usage": self._choices.usage}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The answer in parts; raises APIError."""
        if self._call.echo:
            for index in range(len(self._choices.choices)):
                text, _ = self._with_prompt(index, "", [])
                yield {**self._head, "choices": [self._choice(index, text, [], None)]}
        async for index, piece in self._choices.pieces():
            yield {**self._head, "choices": [self._of_piece(index, piece)]}
        if self._call.options.include_usage:
            yield {**self._head, "choices": [], "usage": self._choices.usage}

    def _of_piece(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._choice(index, piece.text, piece.scored, piece.end)

    def _choice(self, index: int, text: str, tokens, end: str | None) -> dict[str, Any]:
        logprobs = None if self._call.logprobs is None else self._logprobs(tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": end}

    def _logprobs(self, tokens) -> dict[str, Any]:
        """Lists with an element for each token."""
        count = self._call.logprobs
        return {
            "tokens": [token_text(self._tokenizer, each.token) for each in tokens],
            "token_logprobs": [each.score and each.score.logprob for each in tokens],
            "top_logprobs": [self._top(each) for each in tokens] if count else None,
            "text_offset": [each.offset for each in tokens],
        }

    def _top(self, scored: ScoredToken) -> dict[str, float] | None:
        """{token: its log-probability} of the likeliest, and of the token itself."""
        if scored.score is None:
            return None
        found: dict[str, float] = {}
        pairs = [*scored.score.likeliest[: self._call.logprobs]]
        for token, logprob in [*pairs, (scored.token, scored.score.logprob)]:
            found.setdefault(token_text(self._tokenizer, token), logprob)
        return found

    def _with_prompt(self, index: int, text: str, tokens) -> tuple[str, list[ScoredToken]]:
        """A text and its tokens behind those of its prompt."""
        choice = self._choices.choices[index]
        stream, before, offsets = TextStream(self._tokenizer), "", []
        for token in choice.prompt:
            offsets.append(len(before))
            before += stream.add([token])
        before += stream.finish()
        given = self._call.prompts[index // self._call.options.choices]
        if isinstance(given, str):
            before = given
        scores = [None, *choice.answer.prompt_scores]
        of_prompt = (
            [ScoredToken(*each) for each in zip(choice.prompt, offsets, scores, strict=True)]
            if self._call.logprobs is not None
            else []
        )
        moved = [ScoredToken(t.token, t.offset + len(before), t.score) for t in tokens]
        return before + text, of_prompt + moved
