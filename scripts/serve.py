"""Serves a packed checkpoint, or any model, by OpenAI's HTTP API.

  python scripts/serve.py --checkpoint=DIR
  python scripts/serve.py --checkpoint=DIR --port=8080 --slots=16 --name=mine
  python scripts/serve.py --checkpoint=DIR --host=0.0.0.0 --api_key=KEY   # to other machines

It needs `pip install -r requirements-serve.txt`. Clients ask /v1/models, /v1/completions and
/v1/chat/completions. So many requests as there are slots are worked on at once; a new one joins
between two steps. Only this machine may ask, unless there is a key.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

from gptvq_jax.console.model_flags import ModelFlags

_MODEL = ModelFlags()
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen at; 0: one that is free, printed.")
_API_KEY = flags.DEFINE_string(
    "api_key", None, "Key that clients must send; needed where other machines can ask."
)
_NAME = flags.DEFINE_string(
    "name", None, "Under which clients ask for the model; default: that of its directory."
)
_SLOTS = flags.DEFINE_integer("slots", 8, "Requests that are worked on at once.")
_QUEUE = flags.DEFINE_integer("queue", 64, "Requests that may wait; one more is answered 429.")
_CONTEXT = flags.DEFINE_integer(
    "context", None, "Most tokens of a text, prompt included; default: 2048, or the model's."
)


def main(_) -> None:
    from gptvq_jax.serve.http.server import serve

    serve(
        *_MODEL.model,
        host=_HOST.value,
        port=_PORT.value,
        api_key=_API_KEY.value,
        name=_NAME.value,
        slots=_SLOTS.value,
        queue=_QUEUE.value,
        context=_CONTEXT.value,
        **_MODEL.options,
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
