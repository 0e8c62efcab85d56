"""The job of scripts/benchmark_serving.py: a server, its clients, and what is said of them."""

from collections.abc import Sequence
from typing import Any

from gptvq_jax.console.compile_time import CompileTime
from gptvq_jax.console.freed_memory import keep_freed_memory
from gptvq_jax.console.processor import processor_name
from gptvq_jax.console.progress import Progress
from gptvq_jax.serve.engine import Engine
from gptvq_jax.serve.engine_options import check_options
from gptvq_jax.serve.http.server import check_installed
from gptvq_jax.serve.served_model import ServedModel
from gptvq_jax.study import serving_benchmark as bench
from gptvq_jax.study.live_server import live_server, resident_bytes


def benchmark_serving(
    checkpoint: str | None,
    model: str | None,
    *,
    clients: Sequence[int] = (1, 8),
    tokens: int = 64,
    repeats: int = 5,
    requests: int = 0,
    killed: float = 0.0,
    slots: int = 8,
    context: int = 512,
    implementation: str | None = None,
    dtype: str = "float32",
    dense: bool = False,
    adapter: str | None = None,
) -> dict[str, Any]:
    """Measures, prints and returns what `serving_benchmark` says.

    Args:
      checkpoint, model, implementation, dense, adapter: see `ServedModel`.
      clients: how many ask at once, in turn.
      tokens: of an answer, at most.
      repeats: rounds.
      requests: short ones that follow; 0: none.
      killed: the share of these that is cut off.
      slots, context, dtype: see `Engine`.

    Raises:
      ValueError, FileNotFoundError, NotImplementedError: bad input; or a slot was lost.
    """
    check_installed()
    if not 0 <= killed <= 1:
        raise ValueError(f"killed={killed} must be from 0 to 1, a share of the requests")
    served = ServedModel(checkpoint, model, implementation, dense, adapter)
    config = served.source.config
    context = min(context, config.max_position_embeddings)
    check_options(config, slots=slots, context=context)
    most = max(clients)
    # No stop tokens: every answer is as long as it may be.
    engine = Engine(
        config, served.params(dtype), slots=slots, context=context, queue=most, dtype=dtype
    )
    keep_freed_memory()  # as the server does
    apart = CompileTime()
    with Progress(engine.num_programs(), "compile", "program", compiling=apart) as progress:
        engine.warm_up(progress.advance)
    found: dict[str, Any] = {"processor": processor_name(), "slots": slots}
    found["memory_before"] = resident_bytes()
    with live_server(served, engine) as port:
        load = bench.Load(port, served.name, config)
        with Progress(repeats + 1, "clients in turn", "round") as progress:
            found["clients"] = bench.measure_clients(
                load, clients, tokens, repeats, progress.advance
            )
        found["memory_after"] = resident_bytes()
        print(f"{served.name} on {found['processor']}, {slots} slots, answers of {tokens} tokens")
        print(bench.text_of_clients(found["clients"]))
        if found["memory_before"] is not None:
            before, after = (found[f"memory_{when}"] / 2**20 for when in ("before", "after"))
            print(f"memory of the process: {before:.1f} MiB before, {after:.1f} after")
        if requests:
            with Progress(requests, "short requests", "request") as progress:
                found["killed"] = bench.measure_killed(
                    load, engine, requests, killed, most, progress.advance
                )
            print(bench.text_of_killed(found["killed"]))
    lost = found["killed"]["slots_lost"] if requests else 0
    if lost:
        raise ValueError(f"{lost} of {slots} slots are still taken though nobody asks any more")
    return found
