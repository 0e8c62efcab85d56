"""Writes a packed checkpoint in a format that other tools load.

  python scripts/export.py --checkpoint=runs/smollm2_135m_2d/checkpoint --output=exported
  python scripts/export.py --checkpoint=DIR --output=DIR2 --dtype=bfloat16
  python scripts/export.py --checkpoint=DIR --output=DIR2 --format=hf-aqlm
  python scripts/export.py --checkpoint=DIR --output=DIR2 --adapter=DIR3   # LoRA, merged

Both formats are Hugging Face's: config.json, safetensors and the tokenizer. In hf-dense every
quantized weight is replaced by its dequantized value: it is as large as the float model, and any
tool that runs the float model runs it. In hf-aqlm the weights stay as small as they are, and
transformers runs them with the aqlm package (pip install "aqlm[gpu,cpu]" accelerate); it needs one
codebook, or one sum of codebooks, per layer. On a CPU load it with dtype=torch.float32 and, where
codes have 8 bits, set NUMBA_NUM_THREADS=1: threads of that package's kernel overwrite each other.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of a packed checkpoint.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write; must be new or empty.")
_FORMAT = flags.DEFINE_enum("format", "hf-dense", ["hf-dense", "hf-aqlm"], "Format to write.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "float16", "bfloat16"],
    "Of the weights that are not packed; default float32 (exact) in hf-dense, float16 in hf-aqlm.",
)
_ADAPTER = flags.DEFINE_string(
    "adapter", None, "Directory of a LoRA adapter in PEFT's format, merged into hf-dense weights."
)
flags.mark_flags_as_required(["checkpoint", "output"])


def main(_) -> None:
    from gptvq_jax.adapters.peft_files import open_adapter
    from gptvq_jax.console.progress import Progress
    from gptvq_jax.exchange.hf_aqlm import hf_aqlm
    from gptvq_jax.exchange.hf_dense import hf_dense
    from gptvq_jax.storage.checkpoint import PackedCheckpoint

    write, default_dtype = {
        "hf-dense": (hf_dense, "float32"),
        "hf-aqlm": (hf_aqlm, "float16"),
    }[_FORMAT.value]
    dtype, options = _DTYPE.value or default_dtype, {}
    if _FORMAT.value != "hf-dense":
        cli.refuse(["adapter"], "on packed weights; add --format=hf-dense")
    checkpoint = PackedCheckpoint(_CHECKPOINT.value)
    if _ADAPTER.value is not None:
        options["adapter"] = open_adapter(_ADAPTER.value, checkpoint)
    with Progress(checkpoint.config.num_hidden_layers, "export", "block") as progress:
        write(checkpoint, _OUTPUT.value, dtype, on_block=progress.advance, **options)
    print(f"{checkpoint.name} written to {_OUTPUT.value} as {_FORMAT.value}, {dtype}")


if __name__ == "__main__":
    cli.run(main, __doc__)
