"""Sweeps dimensions, bits or any other field, and makes what the runs share once.

  python scripts/sweep.py --config=configs/sweeps/smollm2_dimensionality.py:smoke
  python scripts/sweep.py --config=configs/sweeps/smollm2_dimensionality.py --plan   # and stop
  python scripts/sweep.py --config=configs/sweeps/smollm2_dimensionality.py --cells='^2d'
  python scripts/sweep.py --config=configs/sweeps/smollm2_dimensionality.py:layers

Everything goes to the work directory: cells/NAME is the work directory of a run, results.jsonl and
results.csv have a row for every cell that is finished or has failed. A sweep that was stopped goes
on when the same command is given again, and tries again what has failed. The command may be given
several times at once, also on several machines that share the directory: each process takes what no
other has. --config.base.FIELD=value sets a field in all cells; docs/sweeps.md shows how to write
a config of your own.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

_SWEEP = cli.define_config(sweep=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory; default: runs/<config name>.")
_CELLS = flags.DEFINE_string("cells", None, "Make those alone whose name this expression matches.")
_PLAN = flags.DEFINE_bool("plan", False, "Say what there is to do and what it will take, and stop.")
flags.mark_flag_as_required("config")


def main(_) -> None:
    from ml_collections import config_flags

    from gptvq_jax.study.sweep.start import plan, sweep

    origin = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = _WORKDIR.value or f"runs/{cli.config_name('config')}"
    arguments = _SWEEP.value, origin, cli.given_fields(), workdir, _CELLS.value
    if _PLAN.value:
        plan(*arguments)
        return
    failed = sweep(*arguments)
    if failed:
        raise ValueError(
            f"{len(failed)} cells failed ({', '.join(failed)}); {workdir}/results.jsonl says why, "
            "and the same command tries them again"
        )


if __name__ == "__main__":
    cli.run(main, __doc__)
