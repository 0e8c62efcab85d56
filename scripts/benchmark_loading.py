"""Seconds that loading one block takes, against reading its bytes and casting them once.

  python scripts/benchmark_loading.py
  python scripts/benchmark_loading.py --hidden=8192 --wide=28672      # of a 70B model, 4 GB on disk

A random model of two blocks in bfloat16, in the shape of Llama-2-7B (0.8 GB), is written to a
temporary directory (TMPDIR moves it) and read from the page cache. Loading a block reads it, casts
it to float32, transposes its kernels, checks that all is finite, and leaves it on the device. The
ratio is that to the faster of two casts: of one thread of NumPy, and of XLA on the device.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

_HIDDEN = flags.DEFINE_integer("hidden", 4096, "Hidden size, a multiple of 128.", lower_bound=128)
_WIDE = flags.DEFINE_integer("wide", 11008, "Width of the feed-forward layers.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Rounds, of two blocks each.", lower_bound=1)


def main(_) -> None:
    from gptvq_jax.study.loading_benchmark import measure

    with tempfile.TemporaryDirectory(prefix="gptvq-") as root:
        row = measure(Path(root) / "model", _HIDDEN.value, _WIDE.value, 128, _REPEATS.value)
    print(
        f"a block of {row['bytes'] / 1e6:.0f} MB in bfloat16\n"
        f"{row['read']:8.3f} s  read its bytes\n"
        f"{row['cast_host']:8.3f} s  read and cast them, NumPy\n"
        f"{row['cast_device']:8.3f} s  read and cast them, XLA\n"
        f"{row['load']:8.3f} s  load the block, {row['ratio']:.2f} times the faster of these"
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
