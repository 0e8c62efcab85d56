"""Prints where the time of a run goes, stage by stage, and beside it that of another run.

  python scripts/benchmark_pipeline.py --config=configs/smollm2_135m_2d.py:smoke   # a fresh run
  python scripts/benchmark_pipeline.py --workdir=runs/smollm2_135m_2d              # a finished one
  python scripts/benchmark_pipeline.py --workdir=NEW --against=OLD

Columns, of each stage, of what is in none ("elsewhere") and of the whole run ("total"):
  seconds   wall time in which some thread was in the stage. Stages that overlap count both; a line
            of a kind of layer is the sum over its layers, inside the stage "quantize"
  share     of the whole run; beside another run, the ratio of seconds: 0.50x is half of its time
  TFLOP     10^12 floating-point operations of matrix products, from the shapes that were run
  TFLOP/s   that over seconds, waits, compilation and all
  of rate   that over the rate of float32 matrix products, which is measured now on this machine;
            only of runs that were made on such a processor
  cores     CPU seconds of the process over seconds
  compile   seconds in which some thread compiled, or read a compiled program
  read GB, wrote GB   10^9 bytes that passed through calls to the system, from the disk or its cache
"-" is what was not measured: by older code, by a stage without products, or by this system. Of a
run that was stopped and went on, the numbers are those of its last part.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

_CONFIG = cli.define_config(help="Of a fresh run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "A finished run to read instead.")
_AGAINST = flags.DEFINE_string("against", None, "Another finished run, to compare with.")


def main(_) -> None:
    from gptvq_jax.console.processor import processor_name
    from gptvq_jax.console.time_table import time_table
    from gptvq_jax.run.job import quantize
    from gptvq_jax.study.matmul_rate import matmul_rate

    if (_CONFIG.value is None) == (_WORKDIR.value is None):
        raise ValueError("pass either --config=FILE or --workdir=DIR")
    against = None if _AGAINST.value is None else read_run(Path(_AGAINST.value))
    with tempfile.TemporaryDirectory() as scratch:
        workdir = Path(_WORKDIR.value or scratch)
        if _CONFIG.value is not None:
            quantize(_CONFIG.value, str(workdir), given=cli.given_fields())
            print()
        rows = read_run(workdir)
    rate, processor = matmul_rate(), processor_name()
    this = _WORKDIR.value or f"a fresh run of {cli.config_name()}"
    for name, run in [(this, rows), (f"against {_AGAINST.value}", against)]:
        if run is not None:
            print(f"{name}: on {run[-1].get('processor', 'a processor that was not noted')}")
    print(f"rate: {rate / 1e12:.3f} TFLOP/s in float32 matrix products, on {processor}\n")
    print(time_table(rows, against, rate, processor))


def read_run(workdir: Path) -> list[dict]:
    """The rows of a finished run; its summary is the last."""
    from gptvq_jax.console.json_file import read_json_lines

    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; pass the work directory of a run")
    rows = read_json_lines(path)
    if not all("kind" in row for row in rows):
        raise ValueError(f"{path} holds no rows of a run; pass another work directory")
    if not rows or rows[-1]["kind"] != "summary":
        raise ValueError(f"{workdir} is not finished; run gptvq_jax quantize on it first")
    return rows


if __name__ == "__main__":
    cli.run(main, __doc__)
