"""Quantizes a language model to 2-4 bits per weight and measures it.

  python scripts/quantize.py --config=configs/smollm2_135m_2d.py            # 3 bits, 5 to 8 min
  python scripts/quantize.py --config=configs/smollm2_135m_2d.py:2b --workdir=runs/mine
  python scripts/quantize.py --config=configs/llama2_7b_2d.py:2.125b --config.model=/models/llama2

Everything goes to the work directory: the packed checkpoint, metrics.jsonl, report.png. A run that
was stopped goes on where it was when the same command is given again. Any field of the config can
be set on the command line, as in --config.vq.group_size=4096; gptvq_jax/config.py lists them. A
field that has no effect beside the others is refused with what to set instead.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

from gptvq_jax.console.device_flags import define_devices
from gptvq_jax.console.host_flags import define_hosts

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory; default: runs/<config name>.")
_DEVICES, _HOSTS = define_devices(), define_hosts()
flags.mark_flag_as_required("config")


def main(_) -> None:
    place = _HOSTS.place()
    from gptvq_jax.core.mesh import use_devices
    from gptvq_jax.run.hosts import join_hosts
    from gptvq_jax.run.job import quantize

    if place is not None:
        join_hosts(*place)
    use_devices(_DEVICES.value)
    workdir = _WORKDIR.value or f"runs/{cli.config_name('config')}"
    quantize(_CONFIG.value, workdir, given=cli.given_fields(), command=cli.command_line())


if __name__ == "__main__":
    cli.run(main, __doc__)
