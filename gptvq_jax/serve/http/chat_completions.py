"""The objects that /v1/chat/completions answers with."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from gptvq_jax.serve.http.calls import ChatCall
from gptvq_jax.serve.http.choices import Choices
from gptvq_jax.serve.http.service import Service
from gptvq_jax.serve.http.token_text import token_bytes, token_text


class ChatCompletions:
    """Answers one call. Arguments are those of `Completions`."""

    def __init__(self, service: Service, call: ChatCall, choices: Choices):
        self._tokenizer, self._call, self._choices = service.tokenizer, call, choices
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.name,
        }

    async def answer(self) -> dict[str, Any]:
        """The whole answer; raises APIError."""
        chosen = [
            {
                "index": index,
                "message": {"role": "assistant", "content": found.text, "refusal": None},
                "logprobs": self._logprobs(found.scored),
                "finish_reason": found.end,
            }
            for index, found in enumerate(await self._choices.texts())
        ]
        usage = self._choices.usage
        return {**self._head, "object": "chat.completion", "choices": chosen, "usage": usage}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The answer in parts; raises APIError."""
        head = {**self._head, "object": "chat.completion.chunk"}
        for index in range(len(self._choices.choices)):
            yield {**head, "choices": [self._part(index, {"role": "assistant", "content": ""})]}
        async for index, piece in self._choices.pieces():
            delta = {"content": piece.text} if piece.text or piece.scored else {}
            part = self._part(index, delta, piece.scored, piece.end)
            yield {**head, "choices": [part]}
        if self._call.options.include_usage:
            yield {**head, "choices": [], "usage": self._choices.usage}

    def _part(self, index: int, delta: dict[str, str], tokens=(), end: str | None = None):
        logprobs = self._logprobs(tokens) if tokens else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": end}

    def _logprobs(self, tokens) -> dict[str, Any] | None:
        if self._call.logprobs is None:
            return None
        return {
            "content": [
                {
                    **self._of_token(each.token, each.score.logprob),
                    "top_logprobs": [
                        self._of_token(*pair)
                        for pair in each.score.likeliest[: self._call.logprobs]
                    ],
                }
                for each in tokens
            ],
            "refusal": None,
        }

    def _of_token(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(self._tokenizer, token),
            "logprob": logprob,
            "bytes": token_bytes(self._tokenizer, token),
        }
