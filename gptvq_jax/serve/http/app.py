"""The HTTP API: what comes in as a request goes out as JSON, or as server-sent events."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gptvq_jax.console.errors import brief, first_line
from gptvq_jax.serve.http.calls import read_chat, read_completion
from gptvq_jax.serve.http.chat_completions import ChatCompletions
from gptvq_jax.serve.http.choices import Choices
from gptvq_jax.serve.http.completions import Completions
from gptvq_jax.serve.http.errors import APIError
from gptvq_jax.serve.http.service import Service

_BODY_BYTES = 2**20  # of a request, at most, beside what a full context takes in JSON
_BYTES_OF_TOKEN = 64


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def make_app(service: Service, api_key: str | None = None) -> Starlette:
    """The ASGI application.

    Args:
      service: the model.
      api_key: that every request must bring; None: none.
    """
    created = int(time.time())
    model = {"id": service.name, "object": "model", "created": created, "owned_by": "gptvq_jax"}
    largest = _BODY_BYTES + _BYTES_OF_TOKEN * service.context

    async def models(_: Request) -> Response:
        return _json({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return _json(model)

    async def completions(request: Request) -> Response:
        call = read_completion(await _json_of(request, largest))
        service.check_model(call.options.model)
        choices = await service.start_completion(call)
        made = Completions(service, call, choices)
        return await _respond(request, made, choices, call.options.stream)

    async def chat(request: Request) -> Response:
        call = read_chat(await _json_of(request, largest))
        service.check_model(call.options.model)
        choices = await service.start_chat(call)
        made = ChatCompletions(service, call, choices)
        return await _respond(request, made, choices, call.options.stream)

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ],
        middleware=[] if api_key is None else [Middleware(_Keys, api_key=api_key)],
        exception_handlers={
            APIError: _of_error,
            HTTPException: _of_http,
            ClientGone: _of_nobody,
            Exception: _of_bug,
        },
    )


class EventStream(Response):
    """Server-sent events of choices, which end when the client goes."""

    def __init__(self, events: AsyncIterator[dict[str, Any]], choices: Choices):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._events, self._choices = events, choices

    async def __call__(self, scope, receive, send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)

        async def put(text: str) -> None:
            line = f"data: {text}\n\n".encode()
            await send({"type": "http.response.body", "body": line, "more_body": True})

        async def run() -> None:
            async with contextlib.aclosing(self._events) as events:
                try:
                    async for event in events:
                        await put(json.dumps(event))
                    await put("[DONE]")
                except APIError as error:  # the status has gone out already
                    await put(json.dumps(error.body))
            await send({"type": "http.response.body", "body": b""})

        with contextlib.suppress(ClientGone, OSError):
            await _while_connected(receive, run(), self._choices)


class _Keys:
    """Lets no request through that does not bring the key."""

    def __init__(self, app, api_key: str):
        self._app, self._expected = app, f"Bearer {api_key}".encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self._expected):
                error = APIError(
                    401,
                    "the API key is missing or wrong; send Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
                await _error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _respond(request: Request, made: Any, choices: Choices, stream: bool) -> Response:
    if stream:
        return EventStream(made.events(), choices)
    return _json(await _while_connected(request.receive, made.answer(), choices))


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # Not JSONResponse, which cannot write half of a character that a client sent.
    return Response(json.dumps(body), status, headers, "application/json")


async def _while_connected(receive, work: Coroutine, choices: Choices) -> Any:
    """What some work with choices returns; both are cancelled when the client goes.

    Raises:
      ClientGone: it has.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientGone
    finally:
        choices.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _json_of(request: Request, largest: int) -> dict[str, Any]:
    """The object that a client sent; raises APIError for anything else."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if kind.lower() != "application/json":  # a page of the web can send others to anyone's server
        raise APIError(415, f"Content-Type {brief(kind)} must be application/json")
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > largest:
            raise APIError(413, f"the request has more than {largest} bytes; shorten the prompt")
    try:
        body = json.loads(bytes(content))
    except RecursionError:
        raise APIError(400, "the request is nested too deep") from None
    except ValueError as error:
        raise APIError(400, f"the request is not valid JSON: {first_line(error)}") from None
    if not isinstance(body, dict):
        raise APIError(400, f"the request holds {brief(body)}, not an object with named fields")
    return body


def _error_response(error: APIError) -> Response:
    return _json(error.body, error.status, error.headers)


async def _of_error(_: Request, error: APIError) -> Response:
    return _error_response(error)


async def _of_http(request: Request, error: HTTPException) -> Response:
    place = f"{request.method} {request.url.path}"
    what = f"there is no {place}" if error.status_code in (404, 405) else str(error.detail)
    return _error_response(APIError(error.status_code, what, headers=error.headers))


async def _of_nobody(*_) -> Response:
    return Response(status_code=499)


async def _of_bug(_: Request, error: Exception) -> Response:
    return _error_response(APIError(500, f"{first_line(error)} ({type(error).__name__})"))
