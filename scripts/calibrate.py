"""Sums the second moments of what a float model's layers read, into a file that others add to.

  python scripts/calibrate.py --config=configs/smollm2_135m_2d.py --output=runs/wikipedia.npz
  python scripts/calibrate.py --config=configs/llama2_7b_2d.py --output=wikitext2.npz
  python scripts/calibrate.py --add=A --add=B --output=BOTH

Of the config the model, num_blocks and the calibration text count. Several files of one model add
up: more text, by several machines or of several kinds. A run quantizes from such a file, without
any text, given --config.calibration.statistics=FILE --config.calibration.inputs=float
--config.calibration.asymmetry=0 --config.true_sequential=False. What is stopped goes on when the
same command is given again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

from gptvq_jax.console.device_flags import define_devices

_CONFIG = cli.define_config(help="The model and its text.")
_ADD = flags.DEFINE_multi_string("add", [], "Files to add up, in place of --config.")
_OUTPUT = flags.DEFINE_string("output", None, "The file to write.")
_DEVICES = define_devices()
flags.mark_flag_as_required("output")


def main(_) -> None:
    from gptvq_jax.core.mesh import use_devices
    from gptvq_jax.run.statistics import add, calibrate

    if (_CONFIG.value is None) == (not _ADD.value):
        raise ValueError("give either --config=FILE, to read a text, or --add=FILE twice or more")
    if _ADD.value:
        cli.refuse(["devices"], "on files that are added up; leave it out")
        add(_ADD.value, _OUTPUT.value)
    else:
        use_devices(_DEVICES.value)
        calibrate(_CONFIG.value, _OUTPUT.value, cli.given_fields())


if __name__ == "__main__":
    cli.run(main, __doc__)
