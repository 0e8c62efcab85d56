"""Kills a small run at random moments, resumes it, and compares what comes out.

  python scripts/torture.py              # 100 kills
  python scripts/torture.py --kills=5 --seed=1

The run is of a random model, with token weights, an allocation of bits, an asymmetric target and
block tuning, so that every kind of file is written. A process gets SIGKILL at a moment that is
uniform over the time that a whole run takes, and another one goes on in the same work directory,
until one is done before its moment comes. The manifest, which holds a SHA-256 of the arrays of
every layer, must then be that of a run that was left alone, to the last byte.
"""

import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from gptvq_jax import cli

_KILLS = flags.DEFINE_integer("kills", 100, "How often a process is killed.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written; default: a new one.")


def main(_) -> None:
    from gptvq_jax.progress import Progress

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(_WORKDIR.value or scratch).absolute()
        config = _write_inputs(root)
        # Every program is compiled once, and quickly; processes start with all that is imported.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "xla"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        os.environ["PYTHONWARNINGS"] = "ignore:os.fork:RuntimeWarning"  # JAX is imported only
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["gptvq_jax.run", "matplotlib.pyplot", "transformers"])

        def run(name, moment=None):
            """Whether a process was killed at its moment."""
            arguments = config, root / name, root / "log"
            process = server.Process(target=_quantize, args=arguments, daemon=True)
            process.start()
            process.join(moment)
            killed = process.is_alive()
            process.kill()
            process.join()
            if not killed and process.exitcode:
                last = (root / "log").read_text(errors="replace").strip().splitlines()[-1:]
                raise ValueError(f"a run failed after {stages.total()} kills: {''.join(last)}")
            return killed

        stages, moments = Counter(), random.Random(_SEED.value)
        for name in ("compiling", "whole"):
            begin = time.monotonic()
            run(name)
        seconds = time.monotonic() - begin
        expected = _manifest(root / "whole").read_bytes()
        runs = same = 0
        with Progress(_KILLS.value, "torture", "kill") as progress:
            while stages.total() < _KILLS.value:
                before = stages.total()
                while stages.total() < _KILLS.value and run("killed", moments.uniform(0, seconds)):
                    stages[_stage(root / "killed")] += 1
                    progress.advance()
                run("killed")  # to its end, or no more than a look at what is finished
                runs += stages.total() > before
                same += (
                    stages.total() > before and _manifest(root / "killed").read_bytes() == expected
                )
                shutil.rmtree(root / "killed")
    where = ", ".join(f"{count} {stage}" for stage, count in stages.most_common())
    print(f"{stages.total()} kills ({where}) of {runs} runs: {same} manifests are the same")
    if same < runs:
        raise ValueError(f"{runs - same} of {runs} resumed runs ended with another manifest")


def _write_inputs(root: Path) -> dict:
    """A model and a text; returns what the config changes of the default."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from gptvq_jax.models.random_model import write_random_llama

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    write_random_llama(root / "model", tokenizer, num_blocks=2, hidden=48, head_dim=16)
    text = root / "text.txt"
    text.write_text(" ".join(random.Random(0).choices(["etao", "inshr", "dlu", "fig"], k=2000)))
    small = {"dataset": str(text), "num_windows": 6, "seqlen": 32}
    # What compiles least: nearly all of the time of such a run is the compiler's.
    vq = {"seed": "mahalanobis", "em_iterations": 1, "codebook_update": "none", "polish_rounds": 0}
    return {
        "model": str(root / "model"),
        "vq": {**vq, "codebook_overhead": 0.5},
        "allocation": {"bits_per_value": 1.4, "bits": (0.5, 1.0), "em_iterations": 1},
        "calibration": {**small, "gradient_groups": 1, "asymmetry": 0.25},
        "tune": {"block": True, "epochs": 2, "held_out": 2},
        "evaluation": small,
    }


def _quantize(changes: dict, workdir: Path, log: Path) -> None:
    """What each process does; it prints to a file."""
    from gptvq_jax.config import default_config
    from gptvq_jax.run import quantize

    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    config = default_config()
    config.update(changes)
    quantize(config, str(workdir))


def _manifest(workdir: Path) -> Path:
    return workdir / "checkpoint/manifest.json"


def _stage(workdir: Path) -> str:
    """What was going on, by the files that are there."""
    for path, stage in [
        ("checkpoint/manifest.json", "in evaluation"),
        ("checkpoint", "in quantization"),
        ("gradients/00000.npz", "in allocation"),
        ("gradients", "in gradients"),
    ]:
        if (workdir / path).exists():
            return stage
    return "before them"


if __name__ == "__main__":
    cli.run(main, __doc__)
