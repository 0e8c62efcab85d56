"""Makes a checkpoint of the true shapes of a published model, with random weights.

  python scripts/make_synthetic.py --like=llama2_70b --blocks=2 --output=runs/synthetic_70b
  python scripts/make_synthetic.py --like=smollm2_135m --output=DIR
  python scripts/make_synthetic.py --like=DIR/config.json --blocks=1 --output=OTHER
  python scripts/make_synthetic.py --like=llama2_7b --blocks=8 --packed=2d_2.125 --output=PACKED

What comes out is a directory as on the Hugging Face hub: config.json, a tokenizer with a token for
every byte, bfloat16 weights, one file for each block. Each matrix is Gaussian, and its columns have
scales with a heavy tail, as those of trained models have; norms lie around 1. It computes what a
model of that size computes, and says nothing. Names are those of configs/: llama2_7b, llama2_13b,
llama2_70b, llama3_8b, mistral_7b, mixtral_8x7b, qwen3_8b, ...; a wrong one lists all.

Memory holds a few rows. The disk it takes is said first, and refused where there is not enough.
The same command goes on where it was stopped.

With --packed what comes out is a packed checkpoint with random codes, made without quantizing: for
what serving takes on such shapes. Formats are those of benchmark_decode.py; a wrong one lists all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

_LIKE = flags.DEFINE_string("like", None, "A published model's name, or the path of a config.json.")
_BLOCKS = flags.DEFINE_integer("blocks", 0, "Blocks, from the first; 0: all.", lower_bound=0)
_OUTPUT = flags.DEFINE_string("output", None, "Directory, new or of the same command.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the weights.", lower_bound=0)
_PACKED = flags.DEFINE_string("packed", None, "A packed checkpoint of random codes: its format.")
flags.mark_flags_as_required(["like", "output"])


def main(_) -> None:
    if _PACKED.value:
        from gptvq_jax.study.synthetic_packed import make_packed

        options = (_PACKED.value, _BLOCKS.value, _SEED.value)
        directory = make_packed(_LIKE.value, _OUTPUT.value, *options)
        print(f"written to {directory}; use it as --checkpoint={directory}")
        return
    from gptvq_jax.study.synthetic import make_synthetic

    directory = make_synthetic(_LIKE.value, _OUTPUT.value, _BLOCKS.value, _SEED.value)
    print(f"written to {directory}; use it as --config.model={directory}")


if __name__ == "__main__":
    cli.run(main, __doc__)
