"""Measures methods and settings on saved layers: error, bits, seconds.

  python scripts/benchmark_layers.py --layers=DIR --methods=gptvq,gptq --json=rows.json

Every .npz file of DIR holds `weight` (outputs x inputs) and `hessian` (inputs x inputs).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from gptvq_jax import cli

_LAYERS = flags.DEFINE_string("layers", None, "Directory of .npz files.", required=True)
_METHODS = flags.DEFINE_list("methods", ["gptvq"], "Methods, as in config.method.")
_SETTINGS = flags.DEFINE_list("settings", None, "Settings, such as 2d_3.083; default: all.")
_JSON = flags.DEFINE_string("json", None, "Also write the rows to this file.")


def main(_) -> None:
    from gptvq_jax.layer_benchmark import measure_all

    print(
        "layer                method  setting     rel. error  SQNR dB  bits/value   cold s   warm s"
    )
    rows = []
    for row in measure_all(Path(_LAYERS.value), _METHODS.value, _SETTINGS.value):
        rows.append(row)
        print(
            f"{row['layer']:20s} {row['method']:7s} {row['setting']:10s} "
            f"{row['relative_error']:11.5f} {row['sqnr_db']:8.2f} {row['bits_per_value']:11.4f} "
            f"{row['seconds_cold']:8.2f} {row['seconds']:8.2f}",
            flush=True,
        )
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, __doc__)
