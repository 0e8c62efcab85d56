"""The job of scripts/serve.py: a model behind the HTTP API, until Ctrl-C."""

import importlib.util
import ipaddress
import socket

from gptvq_jax.console.compile_time import CompileTime
from gptvq_jax.console.freed_memory import keep_freed_memory
from gptvq_jax.console.progress import Progress
from gptvq_jax.serve.engine import Engine
from gptvq_jax.serve.engine_options import check_options
from gptvq_jax.serve.engine_thread import EngineThread
from gptvq_jax.serve.served_model import ServedModel
from gptvq_jax.serve.stop_tokens import stop_tokens

_LIBRARIES = ("starlette", "uvicorn")
_BACKLOG = 2048  # connections that wait to be taken
_LARGEST_PORT = 65535
_CONTEXT = 2048  # where the model has more: memory is taken for the whole of it
_SECONDS_TO_END = 5  # in which answers that are going on are to end


def serve(
    checkpoint: str | None,
    model: str | None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    name: str | None = None,
    slots: int = 8,
    queue: int = 64,
    context: int | None = None,
    implementation: str | None = None,
    dtype: str = "float32",
    dense: bool = False,
    adapter: str | None = None,
) -> None:
    """Serves a model; returns or raises KeyboardInterrupt once it has been told to stop.

    Args:
      checkpoint, model, implementation, dense, adapter: see `ServedModel`.
      host, port: where to listen; port 0: one that is free, which is printed.
      api_key: that clients must send; needed unless `host` is this machine alone.
      name: under which clients ask for the model; None: that of its directory.
      slots, queue, dtype: see `Engine`.
      context: most positions of a text; None: 2048, or those of the model where these are fewer.

    Raises:
      ValueError, FileNotFoundError, NotImplementedError, OSError: bad input, in one line with the
        way out.
    """
    check_installed()
    if api_key is None and not is_loopback(host):
        raise ValueError(
            f"--host={host} lets other machines in; add --api_key=KEY, or leave --host out"
        )
    served = ServedModel(checkpoint, model, implementation, dense, adapter)
    source = served.source
    check_options(source.config, slots=slots, context=context, queue=queue)
    context = context or min(_CONTEXT, source.config.max_position_embeddings)
    listener = listen(host, port)
    with listener:
        engine = Engine(
            source.config,
            served.params(dtype),
            slots=slots,
            context=context,
            queue=queue,
            stop_tokens=stop_tokens(source),
            dtype=dtype,
        )
        keep_freed_memory()
        # Compilation is all that is done: its seconds are those of the steps to come.
        nothing_apart = CompileTime()
        with Progress(
            engine.num_programs(), "compile", "program", compiling=nothing_apart
        ) as progress:
            engine.warm_up(progress.advance)
        _run(listener, served, EngineThread(engine), name or served.name, api_key)


def _run(
    listener: socket.socket,
    served: ServedModel,
    thread: EngineThread,
    name: str,
    api_key: str | None,
) -> None:
    import uvicorn

    from gptvq_jax.serve.http.app import make_app
    from gptvq_jax.serve.http.service import Service

    service = Service(served.source, thread, name)

    class Server(uvicorn.Server):
        """Ends what is going on before it waits for its end."""

        async def shutdown(self, sockets=None) -> None:
            service.close()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        make_app(service, api_key),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=_SECONDS_TO_END,
    )
    host, port, *_ = listener.getsockname()
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    engine = thread.engine
    least, most = (size / 2**20 for size in engine.cache_bytes)
    print(
        f"model {name!r} at http://{place}/v1: {engine.num_slots} slots, context "
        f"{engine.context}, caches of {least:.1f} to {most:.1f} MiB; Ctrl-C stops it",
        flush=True,
    )
    try:
        Server(config).run(sockets=[listener])  # raises what Ctrl-C raises, at its end
    finally:
        service.close()
        thread.join(_SECONDS_TO_END)


def check_installed() -> None:
    """Raises ValueError where a library that the server needs is missing."""
    missing = [each for each in _LIBRARIES if importlib.util.find_spec(each) is None]
    if missing:
        raise ValueError(
            f"not installed: {', '.join(missing)}; pip install -r requirements-serve.txt"
        )


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded.

    Raises:
      ValueError: the port is taken or no port, or there is no such address.
    """
    if not 0 <= port <= _LARGEST_PORT:
        raise ValueError(f"--port={port} must be from 0 (any that is free) to {_LARGEST_PORT}")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"--host={host} is no address: {error.strerror or error}") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        # Now, not when the model is loaded: of two servers, the second is to end at once.
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise ValueError(
            f"cannot listen at port {port} of {host}: {error.strerror or error}; pass another "
            "--port, or --port=0 for any that is free"
        ) from None
    return made
