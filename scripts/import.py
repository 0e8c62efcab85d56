"""Makes a packed checkpoint of a model that another tool quantized.

  python scripts/import.py --model=ISTA-DASLab/Llama-2-7b-AQLM-2Bit-1x16-hf --output=imported
  python scripts/import.py --model=DIR --output=DIR2 --dense_dtype=bfloat16

The one format so far, hf-aqlm, is that of the aqlm package: a directory, or a name on the Hugging
Face hub, whose config.json says quant_method "aqlm". scripts/evaluate.py, scripts/generate.py and
scripts/export.py then take --checkpoint=OUTPUT.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

_MODEL = flags.DEFINE_string("model", None, "Directory, or name on the Hugging Face hub.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write; must be new or empty.")
_FORMAT = flags.DEFINE_enum("format", "hf-aqlm", ["hf-aqlm"], "Format to read.")
_DENSE_DTYPE = flags.DEFINE_enum(
    "dense_dtype",
    "float16",
    ["float16", "bfloat16", "float32"],
    "Of the embedding, norms, head and other weights that are not quantized.",
)
flags.mark_flags_as_required(["model", "output"])


def main(_) -> None:
    from gptvq_jax.console.progress import Progress
    from gptvq_jax.exchange.aqlm_source import AQLMSource
    from gptvq_jax.exchange.import_aqlm import import_aqlm
    from gptvq_jax.models.hf_directory import HFDirectory

    source = AQLMSource(HFDirectory.open(_MODEL.value))
    with Progress(source.config.num_hidden_layers, "import", "block") as progress:
        import_aqlm(source, _OUTPUT.value, _DENSE_DTYPE.value, on_block=progress.advance)
    print(f"{source.name} written to {_OUTPUT.value}: {source.format}")


if __name__ == "__main__":
    cli.run(main, __doc__)
