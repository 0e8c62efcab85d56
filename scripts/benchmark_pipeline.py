"""Prints where the time of a run goes: seconds by stage, by kind of layer, and in compilation.

python scripts/benchmark_pipeline.py --config=configs/smollm2_135m_2d.py:smoke   # a fresh run
python scripts/benchmark_pipeline.py --workdir=runs/smollm2_135m_2d              # one that was made
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

_CONFIG = cli.define_config(help="Of a fresh run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "A finished run to read instead.")


def main(_) -> None:
    from gptvq_jax.console.report import time_table
    from gptvq_jax.run.job import quantize

    if (_CONFIG.value is None) == (_WORKDIR.value is None):
        raise ValueError("pass either --config=FILE or --workdir=DIR")
    with tempfile.TemporaryDirectory() as scratch:
        workdir = Path(_WORKDIR.value or scratch)
        if _CONFIG.value is not None:
            quantize(_CONFIG.value, str(workdir), given=cli.given_fields())
        rows = read_metrics(workdir / "metrics.jsonl")
    if not rows or rows[-1]["kind"] != "summary":
        raise ValueError(f"{workdir} is not finished; run gptvq_jax quantize on it first")
    print(time_table(rows[:-1], rows[-1]))


def read_metrics(path: Path) -> list[dict]:
    """The rows of a run."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; pass the work directory of a run")
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        _ = [row["kind"] for row in rows]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} holds no rows of a run; pass another work directory") from None
    return rows


if __name__ == "__main__":
    cli.run(main, __doc__)
