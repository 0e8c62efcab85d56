"""Peak memory of quantizing one large random layer on the CPU, each setting in a fresh process.

  python scripts/benchmark_big_layer.py --shape=11008x4096 --settings=2d_2.125,4d_2.222
  python scripts/benchmark_big_layer.py --shape=4096x4096 --settings=aqlm_1x16    # half an hour

The shapes are those of Llama-2-7B layers; 2d_2.125 has codebooks of 16 centroids, 4d_2.222 of 256,
aqlm_1x16 one of 65,536; trellis_2.13 searches 4096 windows. Columns: peak resident memory; how much
of it was reached before quantization began (Python, JAX, the layer); seconds with compilation;
error and size as in benchmark_layers.py.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

_SHAPE = flags.DEFINE_string("shape", "11008x4096", "Outputs x inputs.")
_SETTINGS = flags.DEFINE_list(
    "settings", ["2d_2.125", "4d_2.222"], "Settings of gptvq, aqlm, trellis."
)
_ALONE = flags.DEFINE_bool("alone", False, "Measure one setting in this process; print JSON.")


def main(_) -> None:
    from gptvq_jax.study.layer_benchmark import choose, measure_memory

    shape = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", _SHAPE.value)
    if not shape:
        raise ValueError(f"--shape={_SHAPE.value} must be ROWSxCOLS, such as 11008x4096")
    chosen = choose(["gptvq", "aqlm", "trellis"], _SETTINGS.value)
    if _ALONE.value:
        if len(chosen) != 1:
            raise ValueError(f"--alone measures one setting; --settings names {len(chosen)}")
        ((method, setting),) = chosen
        print(json.dumps(measure_memory(*map(int, shape.groups()), method, setting)))
        return
    print(f"{_SHAPE.value}\nsetting     peak GiB  before GiB   cold s  rel. error  bits/value")
    for _, setting in chosen:
        row = measure_alone(setting)
        print(
            f"{setting:10s} {row['peak_memory_bytes'] / 2**30:9.2f} "
            f"{row['memory_before_bytes'] / 2**30:11.2f} {row['seconds_cold']:8.1f} "
            f"{row['relative_error']:11.5f} {row['bits_per_value']:11.4f}",
            flush=True,
        )


def measure_alone(setting: str) -> dict:
    """The row of a setting, measured by this script in a process of its own."""
    command = [sys.executable, __file__, "--alone", f"--shape={_SHAPE.value}"]
    # Cold means compiled anew: compilation takes its time and memory.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    child = subprocess.run(
        [*command, f"--settings={setting}"], stdout=subprocess.PIPE, text=True, env=environment
    )
    if child.returncode:
        raise ChildProcessError(
            f"measuring {setting} ended with status {child.returncode} (-9: out of memory); "
            "its message is above"
        )
    return json.loads(child.stdout)


if __name__ == "__main__":
    cli.run(main, __doc__)
