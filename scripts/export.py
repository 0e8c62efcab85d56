"""Writes a packed checkpoint in a format that other tools load.

  python scripts/export.py --checkpoint=runs/smollm2_135m_2d/checkpoint --output=exported
  python scripts/export.py --checkpoint=DIR --output=DIR2 --dtype=bfloat16

The one format so far, hf-dense, is Hugging Face's: config.json, safetensors and the tokenizer, with
every quantized weight replaced by its dequantized value. It is as large as the float model, and any
tool that runs the float model runs it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from gptvq_jax import cli

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of a packed checkpoint.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write; must be new or empty.")
_FORMAT = flags.DEFINE_enum("format", "hf-dense", ["hf-dense"], "Format to write.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "float16", "bfloat16"], "Of the weights; float32 is exact."
)
flags.mark_flags_as_required(["checkpoint", "output"])


def main(_) -> None:
    from gptvq_jax.checkpoint import PackedCheckpoint
    from gptvq_jax.export import hf_dense
    from gptvq_jax.progress import Progress

    checkpoint = PackedCheckpoint(_CHECKPOINT.value)
    with Progress(checkpoint.config.num_hidden_layers, "export", "block") as progress:
        hf_dense(checkpoint, _OUTPUT.value, _DTYPE.value, on_block=progress.advance)
    print(f"{checkpoint.name} written to {_OUTPUT.value} as {_FORMAT.value}, {_DTYPE.value}")


if __name__ == "__main__":
    cli.run(main, __doc__)
