"""A server of this process at a free port of this machine, and a client that times its answer."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

from gptvq_jax.serve.engine import Engine
from gptvq_jax.serve.engine_thread import EngineThread
from gptvq_jax.serve.http.server import check_installed, listen
from gptvq_jax.serve.served_model import ServedModel

_STATM = Path("/proc/self/statm")
_SECONDS = 30  # for an answer, or for the server's end


class Answer(NamedTuple):
    """What a client saw."""

    tokens: int  # of the text; 0 where it hung up
    first: float  # seconds until the first of them
    last: float  # seconds until the end


@contextlib.contextmanager
def live_server(served: ServedModel, engine: Engine) -> Iterator[int]:
    """Answers requests of `served.name` as scripts/serve.py does; gives the port.

    Raises:
      ValueError: what the server needs is not installed.
    """
    check_installed()
    import uvicorn

    from gptvq_jax.serve.http.app import make_app
    from gptvq_jax.serve.http.service import Service

    thread = EngineThread(engine)
    service = Service(served.source, thread, served.name)
    with listen("127.0.0.1", 0) as listener:
        options = {"log_level": "error", "access_log": False, "lifespan": "off"}
        server = uvicorn.Server(uvicorn.Config(make_app(service), **options))
        runner = threading.Thread(target=server.run, args=([listener],), daemon=True)
        runner.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            service.close()
            runner.join(_SECONDS)
            thread.join(_SECONDS)


def ask(
    port: int, name: str, prompt: Sequence[int], tokens: int, hang_up_after: int | None = None
) -> Answer:
    """A greedy continuation as a stream.

    Args:
      port: of the server.
      name: of the model.
      prompt: token ids.
      tokens: at most so many.
      hang_up_after: pieces of the text after which the connection is closed; None: never.

    Raises:
      OSError: the server answers with an error.
    """
    body = {"model": name, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    connection = HTTPConnection("127.0.0.1", port, timeout=_SECONDS * 10)
    start, first, pieces, made = time.perf_counter(), 0.0, 0, 0
    try:
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise OSError(f"the server answers {answer.status}: {answer.read()[:200]!r}")
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            pieces += 1
            first = first or time.perf_counter() - start
            if pieces == hang_up_after:
                return Answer(0, first, time.perf_counter() - start)
            made = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", made)
        return Answer(made, first, time.perf_counter() - start)
    finally:
        connection.close()


def settled(engine: Engine, seconds: float = _SECONDS) -> bool:
    """Waits until an engine has no request left; returns whether that came about."""
    end = time.perf_counter() + seconds
    while engine.num_jobs and time.perf_counter() < end:
        time.sleep(0.01)
    return not engine.num_jobs


def resident_bytes() -> int | None:
    """Memory of this process; None where the system does not say."""
    if not _STATM.exists():
        return None
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
