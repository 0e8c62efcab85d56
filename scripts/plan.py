"""Says what a run will take before anything runs: memory, disk, work by stage, and time.

  python scripts/plan.py --config=configs/smollm2_135m_2d.py
  python scripts/plan.py --config=configs/llama2_70b_2d.py --device=h100       # also a100, v5e, v6e
  python scripts/plan.py --config=configs/llama2_7b_4d.py --config.calibration.num_windows=32
  python scripts/plan.py --config=configs/smollm2_135m_2d.py --like=DIR/config.json --json

Takes the flags of scripts/quantize.py. Without --device the time is that of this machine: programs
of the run are compiled and called on random numbers for about half a minute. With it, time follows
from published rates, and every assumption is printed. No weight is read: of a model that is not on
this machine, the shapes of the published one that the config is named after are taken, or those of
--like. Columns of the table of stages:
  TFLOP      10^12 operations of matrix products, as scripts/benchmark_pipeline.py counts them
  files GB   10^9 bytes of activations, weights or checkpoint that are read and written
  launches   kernels that quantizing launches, on an accelerator
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

_CONFIG = cli.define_config()
_DEVICE = flags.DEFINE_string("device", None, "h100, a100, v5e or v6e; default: this machine.")
_LIKE = flags.DEFINE_string("like", None, "Shapes: a published model's name, or a config.json.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON with every item instead of tables.")
flags.mark_flag_as_required("config")


def main(_) -> None:
    from gptvq_jax.study.plan.plan import make_plan
    from gptvq_jax.study.plan.table import plan_text

    arguments = cli.config_name(), _DEVICE.value, _LIKE.value, cli.given_fields()
    plan = make_plan(_CONFIG.value, *arguments)
    print(json.dumps(plan, indent=2) if _JSON.value else plan_text(plan))


if __name__ == "__main__":
    cli.run(main, __doc__)
