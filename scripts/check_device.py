"""Checks an accelerator in ten minutes: kernels, decode, a 7B and a 70B block, a small model.

  python scripts/check_device.py
  python scripts/check_device.py --sections=kernels,decode --output=h100.json
  python scripts/check_device.py --minutes=20               # where programs compile slowly

Each section runs in a process of its own and has its share of the time; one that fails stops no
other, and the exit status is then 1. Sections: kernels multiplies with packed weights in every
implementation that runs here, against float64; decode measures them, as benchmark_decode.py;
block_7b and block_70b quantize layers of the shapes of Llama-2 by move, their widths divided where
memory or time do not allow them, and the same layer twice, which must give the same bits; smoke
quantizes two blocks of SmolLM2. Writes a report, with sections that an earlier one on the same
device had, and prints a Markdown table. On a CPU it is a check of the check.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

_SECTIONS = flags.DEFINE_list(
    "sections",
    ["kernels", "decode", "block_7b", "block_70b", "smoke"],
    "What to check, beside the device itself.",
)
_OUTPUT = flags.DEFINE_string("output", "device-report.json", "File of the report.")
_MINUTES = flags.DEFINE_float("minutes", 10.0, "For all sections together.", lower_bound=0.1)
_ALONE = flags.DEFINE_string("alone", None, "Run this section in this process; writes --output.")
_SECONDS = flags.DEFINE_float("seconds", 60.0, "With --alone: that it may take.", lower_bound=1.0)


def main(_) -> None:
    if _ALONE.value:
        cli.refuse(["sections", "minutes"], "on a section alone, which has --seconds")
        run_alone(_ALONE.value, _SECONDS.value, Path(_OUTPUT.value))
        return
    cli.refuse(["seconds"], "without --alone; give --minutes")
    from gptvq_jax import __version__
    from gptvq_jax.study import check_device
    from gptvq_jax.study.check_device_table import table

    names = check_device.chosen_sections(_SECTIONS.value)
    output = Path(_OUTPUT.value)
    report = check_device.check(names, _MINUTES.value, output, in_own_process, __version__)
    print(table(report))
    print(f"\nwritten to {_OUTPUT.value}")
    if failed := check_device.failed(report):
        raise ValueError(f"failed: {', '.join(failed)}")


def in_own_process(name: str, seconds: float) -> dict:
    from gptvq_jax.study.check_device import in_process

    with tempfile.TemporaryDirectory(prefix="gptvq-") as root:
        result = Path(root) / "found.json"
        command = [sys.executable, __file__, f"--alone={name}", f"--seconds={max(1.0, seconds)}"]
        return in_process([*command, f"--output={result}"], seconds, result)


def run_alone(name: str, seconds: float, output: Path) -> None:
    from gptvq_jax.console.errors import first_line
    from gptvq_jax.files.durable import write_text
    from gptvq_jax.study import check_device_sections as sections

    here = Path(__file__).parent
    smoke = f"{here.parent / 'configs/smollm2_135m_2d.py'}:smoke"
    jobs = {
        "device": sections.device,
        "kernels": sections.kernels,
        "decode": sections.decode,
        "block_7b": partial(sections.block, like="llama2_7b"),
        "block_70b": partial(sections.block, like="llama2_70b"),
        "smoke": partial(sections.smoke, script=here / "quantize.py", config=smoke),
    }
    if name not in jobs:
        raise ValueError(f"--alone={name} is none of {', '.join(jobs)}")
    try:
        found = jobs[name](seconds)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        write_text(output, json.dumps({"error": reason}) + "\n")
        raise
    write_text(output, json.dumps(found) + "\n")


if __name__ == "__main__":
    cli.run(main, __doc__)
