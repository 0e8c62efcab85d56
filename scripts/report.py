"""Shows what runs and sweeps came to: one HTML page with a table and curves, also SVG and PNG.

  python scripts/report.py --workdir=runs/smollm2_135m_2d                  # of one run
  python scripts/report.py --workdir=runs/smollm2_dimensionality           # of a sweep
  python scripts/report.py --workdir=runs/one --workdir=runs/two --output=compared
  python scripts/report.py --workdir=DIR --prompt="Once upon a time" --prompt="The moon is"

The page is index.html in --output; it loads nothing, so that it can be sent as it is. Models that
take at most 1 GiB in float32 are asked to continue a few prompts, before and after; larger ones if
--prompt names them. That can take minutes, which --noprompts saves; what they said is kept beside
the page. What is missing, such as layers of a run that failed, is said there and here, and the
rest is made.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

_WORKDIR = flags.DEFINE_multi_string(
    "workdir", None, "Of a run or of a sweep; repeat it, or separate several by commas."
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory; default: report in the first --workdir.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text for the models to continue; repeatable.")
_PROMPTS = flags.DEFINE_bool("prompts", True, "Ask the models; --noprompts leaves it out.")
flags.mark_flag_as_required("workdir")


def main(_) -> None:
    from gptvq_jax.study.report.report import report

    if not _PROMPTS.value:
        cli.refuse(["prompt"], "with --noprompts; leave that out")
    directories = [
        Path(name)
        for given in _WORKDIR.value
        for name in ([given] if Path(given).exists() else given.split(","))
    ]
    output = None if _OUTPUT.value is None else Path(_OUTPUT.value)
    report(directories, output, _PROMPT.value, _PROMPTS.value)


if __name__ == "__main__":
    cli.run(main, __doc__)
