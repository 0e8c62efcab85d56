"""Measures what a server does for one client and for several at once, and that none is lost.

  python scripts/benchmark_serving.py --checkpoint=DIR                     # 1 and 8 clients
  python scripts/benchmark_serving.py --checkpoint=DIR --clients=1,4,8,16 --slots=16
  python scripts/benchmark_serving.py --checkpoint=DIR --requests=1000 --killed=0.1

The server is that of serve.py, in this process, at a free port of this machine; the clients are
threads that read streams. It needs `pip install -r requirements-serve.txt`. Numbers of clients take
turns, round after round. Columns: tokens per second of all clients together, from their requests to
the last answer's end, median over rounds with quartiles; the same relative to the first number of
clients; milliseconds to the first token. --requests adds so many short requests, of which the share
--killed hangs up midway; that ends with status 1 if one of them still has a slot after it.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

from gptvq_jax.console.model_flags import ModelFlags

_MODEL = ModelFlags()
flags.DEFINE_list("clients", ["1", "8"], "Clients that ask at once; several numbers take turns.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "Of an answer.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Rounds.", lower_bound=1)
_REQUESTS = flags.DEFINE_integer("requests", 0, "Short requests that follow.", lower_bound=0)
_KILLED = flags.DEFINE_float("killed", 0.0, "The share of --requests that is cut off midway.")
_SLOTS = flags.DEFINE_integer("slots", 8, "Requests that are worked on at once.")
_CONTEXT = flags.DEFINE_integer("context", 512, "Most tokens of a text, prompt included.")
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")


def main(_) -> None:
    from gptvq_jax.files.durable import write_text
    from gptvq_jax.study.serving_job import benchmark_serving

    if not _REQUESTS.value:
        cli.refuse(["killed"], "without short requests; add --requests=1000")
    found = benchmark_serving(
        *_MODEL.model,
        clients=cli.integers("clients"),
        tokens=_TOKENS.value,
        repeats=_REPEATS.value,
        requests=_REQUESTS.value,
        killed=_KILLED.value,
        slots=_SLOTS.value,
        context=_CONTEXT.value,
        **_MODEL.options,
    )
    if _JSON.value:
        write_text(_JSON.value, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, __doc__)
