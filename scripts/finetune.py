"""Tunes a packed model as a whole, so that its next tokens come closer to the float model's.

  python scripts/finetune.py --checkpoint=runs/smollm2_135m_2d/checkpoint --workdir=runs/tuned
  python scripts/finetune.py --checkpoint=DIR --workdir=OUT --config=configs/smollm2_135m_tune.py
  python scripts/finetune.py --checkpoint=DIR --workdir=OUT --config.finetune.codes=True
  python scripts/finetune.py --checkpoint=DIR --workdir=OUT --model=/models/llama2

Codebooks, scales and norms move, on text that config.calibration names; codes stay as they are, but
with finetune.codes, which chooses some of them again after every look at the text held out. The
work directory gets a new checkpoint of the same size, the loss by step in metrics.jsonl, and what a
stopped tuning goes on from when the same command is given again. Of a config, finetune.*,
evaluation.*, and datasets, seqlen and bos of calibration count; gptvq_jax/config.py lists them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

from gptvq_jax.console.device_flags import define_devices

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of the packed checkpoint.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory, another than the checkpoint's.")
_CONFIG = cli.define_config("smollm2_135m_tune", "How to tune; default: smollm2_135m_tune.")
_MODEL = flags.DEFINE_string(
    "model", None, "The float model that the checkpoint was made from, where it has moved."
)
_DEVICES = define_devices()
flags.mark_flags_as_required(["checkpoint", "workdir"])


def main(_) -> None:
    from gptvq_jax.core.mesh import use_devices
    from gptvq_jax.run.finetune_job import finetune

    use_devices(_DEVICES.value)
    finetune(
        _CHECKPOINT.value,
        _WORKDIR.value,
        _CONFIG.value,
        _MODEL.value,
        cli.given_fields(),
        cli.command_line(),
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
