"""Measures what each choice is worth, one field of the config at a time.

  python scripts/ablate.py                  # everything, about two hours on 2 cores
  python scripts/ablate.py --tables=layers  # layers only, about 15 min
  python scripts/ablate.py --tables=model --rows="default,no polish"
  python scripts/ablate.py --tables=layers --settings=trellis_2.13_l10
  python scripts/ablate.py --tables=model --config=configs/smollm2_135m_trellis.py:2b --rows=default

Layers: relative output error on six layers of SmolLM2-135M (those of scripts/benchmark_layers.py),
at the settings named, of GPTVQ or of trellis codes, which have rows of their own. Model: rise of
log-perplexity of whole runs of --config, with the rows of its method. Each table starts with the
default, and the others are compared with it; differences smaller than those between the rows
"default" and "default (seed ...)" mean nothing. Rows, tables and a plot go to --directory; a model
run that was stopped, or made before, goes on or is read from there.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

_CONFIG = cli.define_config("smollm2_135m_2d:ablation", "What the model rows change.")
_TABLES = flags.DEFINE_multi_enum("tables", ["layers", "model"], ["layers", "model"], "Which.")
_SETTINGS = flags.DEFINE_list("settings", ["2d_2.125", "4d_2.222"], "Of the layer rows.")
_ROWS = flags.DEFINE_list("rows", None, "Rows; default: all. A wrong name lists them.")
_LAYERS = flags.DEFINE_string("layers", None, "Directory of .npz files; default: runs/layers.")
_DIRECTORY = flags.DEFINE_string("directory", "runs/ablations", "Where the results go.")


def main(_) -> None:
    from gptvq_jax.console.progress import Progress
    from gptvq_jax.console.report import json_numbers
    from gptvq_jax.files.durable import write_text
    from gptvq_jax.run.overrides import settle
    from gptvq_jax.study import ablations
    from gptvq_jax.study.layer_benchmark import layer_files
    from gptvq_jax.study.sample_layers import smollm2_layers

    base, note = settle(_CONFIG.value, cli.given_fields())
    chosen = ablations.choose(_TABLES.value, _ROWS.value, _SETTINGS.value, base.method)
    settings = [table for table in chosen if table != "model"]
    if not settings:
        cli.refuse(["layers", "settings"], "without layer rows; add --tables=layers")
    if "model" not in chosen:
        cli.refuse(["config", *cli.given_flags("config")], "without model rows; add --tables=model")
    if note:
        print(note)
    directory = Path(_DIRECTORY.value)
    directory.mkdir(parents=True, exist_ok=True)
    tables = {}
    if settings:
        if _LAYERS.value is None:
            smollm2_layers(Path("runs/layers"))
        files = layer_files(Path(_LAYERS.value or "runs/layers"))
        total = sum(len(chosen[setting]) for setting in settings)
        with Progress(total, "layers", "row") as progress:
            for setting in settings:
                rows = []
                for name in chosen[setting]:
                    progress.note(name)
                    rows.append(ablations.layer_row(name, setting, files))
                    progress.advance(name)
                tables[setting] = rows, "relative_error"
    if "model" in chosen:
        rows = []
        for name in chosen["model"]:
            print(name, flush=True)
            rows.append(ablations.model_row(name, base, directory))
        tables["model"] = rows, "rise"

    text = "\n\n".join(f"{t}\n\n{ablations.table(*rows)}" for t, rows in tables.items())
    print(text)
    write_text(directory / "tables.md", text + "\n")
    by_title = json_numbers({title: rows for title, (rows, _) in tables.items()})
    write_text(directory / "rows.json", json.dumps(by_title, indent=1) + "\n")
    ablations.plot(tables, directory / "ablations.png")
    print(f"written to {directory}")


if __name__ == "__main__":
    cli.run(main, __doc__)
