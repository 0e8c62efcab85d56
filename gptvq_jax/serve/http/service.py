"""One model under its name: from a call of the API to requests of the engine."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gptvq_jax.core.seeds import LARGEST_SEED
from gptvq_jax.data.vocabulary import check_tokens, encode
from gptvq_jax.models.source import ModelSource
from gptvq_jax.serve.engine_thread import EngineThread
from gptvq_jax.serve.http.calls import ChatCall, CompletionCall
from gptvq_jax.serve.http.choices import Choices
from gptvq_jax.serve.http.errors import APIError, bad_field
from gptvq_jax.serve.job_queue import EngineFull
from gptvq_jax.serve.prompts import check_unicode, render_chat
from gptvq_jax.serve.requests import Request


class Service:
    """One model, under its name.

    Args:
      source: of the tokenizer and the chat template.
      thread: of the engine.
      name: that clients ask for.
    """

    def __init__(self, source: ModelSource, thread: EngineThread, name: str):
        self.tokenizer, self.thread, self.name = source.tokenizer, thread, name
        self._vocab_size = source.config.vocab_size
        # One at a time, and once before there are threads: a tokenizer may change as it encodes.
        with contextlib.suppress(ValueError):
            encode(self.tokenizer, "a", "a letter")
        self._encoder = ThreadPoolExecutor(1, "tokenizer")

    @property
    def context(self) -> int:
        return self.thread.engine.context

    def close(self) -> None:
        """Ends all requests."""
        self.thread.close()
        self._encoder.shutdown(wait=False, cancel_futures=True)

    async def start_completion(self, call: CompletionCall) -> Choices:
        """Queues what a call asks for.

        Raises:
          APIError: the model cannot do it, or the queue is full.
        """
        prompts = await self._in_encoder(self._encode_all, call.prompts)
        for tokens in prompts:
            self._check_room("prompt", "max_tokens", tokens, call.max_tokens)
        score_prompt = call.echo and call.logprobs is not None
        return self._start(call, "prompt", prompts, call.max_tokens, score_prompt)

    async def start_chat(self, call: ChatCall) -> Choices:
        """As `start_completion`."""
        tokens = await self._in_encoder(self._encode_chat, call.messages)
        self._check_room("messages", call.max_tokens_field, tokens, call.max_tokens or 1)
        room = self.context - len(tokens)
        return self._start(call, "messages", [tokens], call.max_tokens or room, False)

    def check_model(self, name: str) -> None:
        """Raises APIError for any other name than that of the model."""
        if name != self.name:
            raise APIError(
                404,
                f"there is no model {name!r}; this server has {self.name!r}",
                "model",
                "model_not_found",
            )

    def _start(
        self,
        call: CompletionCall | ChatCall,
        field: str,
        prompts: Sequence[tuple[int, ...]],
        max_tokens: int,
        score_prompt: bool,
    ) -> Choices:
        options = call.options
        found = Choices(self.tokenizer, prompts, options)
        most = self.thread.engine.most_jobs
        if len(found.choices) > most:
            many = field if len(prompts) > most else "n"
            raise bad_field(many, f"asks for {len(found.choices)} texts; the server takes {most}")
        pairs = []
        for index, choice in enumerate(found.choices):
            request = Request(
                choice.prompt,
                max_tokens,
                options.sampling,
                (options.seed + index) % (LARGEST_SEED + 1),
                scored=call.logprobs is not None,
                score_prompt=score_prompt,
            )
            pairs.append((request, choice.answer))
        try:
            jobs = self.thread.submit(*pairs)
        except EngineFull as error:
            if self.thread.engine.closed:
                raise APIError(503, "the server stops") from None
            raise APIError(
                429,
                f"{error}; come again later",
                code="queue_full",
                headers={"retry-after": str(error.seconds or 1)},
            ) from None
        for choice, job in zip(found.choices, jobs, strict=True):
            choice.job = job
        return found

    async def _in_encoder(self, work: Callable[..., Any], *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._encoder, work, *arguments)
        except RuntimeError:
            if self.thread.engine.closed:
                raise APIError(503, "the server stops") from None
            raise

    def _encode_all(self, prompts: Sequence[str | tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [self._encode("prompt", prompt) for prompt in prompts]

    def _encode_chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise APIError(400, "the model has no chat template; ask /v1/completions", "messages")
        try:
            text = render_chat(self.tokenizer, messages, True, fix="change messages")
        except ValueError as error:
            raise APIError(400, str(error), "messages") from None
        # The template has written the special tokens.
        return self._encode("messages", text, add_special_tokens=False)

    def _encode(self, field: str, text: str | tuple[int, ...], **options: Any) -> tuple[int, ...]:
        try:
            if not isinstance(text, str):
                wrong = [token for token in text if not 0 <= token < self._vocab_size]
                if wrong:
                    raise bad_field(
                        field, f"has the token {wrong[0]}; ids are below {self._vocab_size}"
                    )
            else:
                check_unicode(field, text)
                text = tuple(encode(self.tokenizer, text, field, verbose=False, **options))
            if not text:
                raise bad_field(field, "is empty; write what the model is to continue")
            check_tokens(text, self._vocab_size, self.tokenizer, field)
        except ValueError as error:
            raise APIError(400, str(error), field) from None
        return text

    def _check_room(self, field: str, limit: str, tokens: Sequence[int], max_tokens: int) -> None:
        if len(tokens) + max_tokens > self.context:
            wrong = field if len(tokens) >= self.context else limit
            raise APIError(
                400,
                f"{field} has {len(tokens)} tokens; with {max_tokens} more it does not fit in the "
                f"context of {self.context}; shorten it or lower {limit}",
                wrong,
                "context_length_exceeded",
            )
