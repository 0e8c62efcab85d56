"""Kills a small run at random moments, resumes it, and compares what comes out.

  python scripts/torture.py              # 100 kills
  python scripts/torture.py --kills=5 --seed=1

The run is of a random model, with token weights, an allocation of bits, an asymmetric target and
block tuning, so that every kind of file is written. Each process gets SIGKILL at a random moment,
and another one goes on in the same work directory. The manifest, which holds a SHA-256 of the
arrays of every layer, must then be that of a run that was left alone, to the last byte.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from gptvq_jax.console import cli

_KILLS = flags.DEFINE_integer("kills", 100, "How often a process is killed.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
_WORKDIR = flags.DEFINE_string("workdir", None, "New directory for its files; default: temporary.")


def main(_) -> None:
    from gptvq_jax.console.progress import Progress
    from gptvq_jax.study.torture import torture

    with (
        tempfile.TemporaryDirectory() as scratch,
        Progress(_KILLS.value, "torture", "kill") as progress,
    ):
        root = Path(_WORKDIR.value or scratch).absolute()
        stages, runs, same = torture(root, _KILLS.value, _SEED.value, progress.advance)
    where = ", ".join(f"{count} {stage}" for stage, count in stages.most_common())
    print(f"{stages.total()} kills ({where}) of {runs} runs: {same} manifests are the same")
    if same < runs:
        raise ValueError(f"{runs - same} of {runs} resumed runs ended with another manifest")


if __name__ == "__main__":
    cli.run(main, __doc__)
