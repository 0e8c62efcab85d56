"""Kills a small run at random moments, resumes it, and compares what comes out.

  python scripts/torture.py              # 100 kills
  python scripts/torture.py --kills=5 --seed=1

The run is of a random model, with token weights, an allocation of bits, an asymmetric target and
block tuning, so that every kind of file is written. Each process gets SIGKILL at a moment that is
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
_BLOCKS = 2


def main(_) -> None:
    from gptvq_jax.progress import Progress

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(_WORKDIR.value or scratch).absolute()
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "xla"))
        os.environ["PYTHONWARNINGS"] = "ignore:os.fork:RuntimeWarning"  # of a server without JAX
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["gptvq_jax.run", "matplotlib.pyplot"])
        config = _write_inputs(root)

        def start(name):
            arguments = config, root / name, root / "log"
            process = processes.Process(target=_quantize, args=arguments, daemon=True)
            process.start()
            return process

        for name in ("compiling", "whole"):  # the second one takes the time of those that follow
            begin = time.monotonic()
            process = start(name)
            process.join()
            _check(process, root)
        seconds = time.monotonic() - begin
        expected = _manifest(root / "whole").read_bytes()

        moments = random.Random(_SEED.value)
        stages, runs, same = Counter(), 0, 0
        with Progress(_KILLS.value, "torture", "kill") as progress:
            while sum(stages.values()) < _KILLS.value:
                killed = 0
                while True:
                    process = start("killed")
                    last = sum(stages.values()) == _KILLS.value
                    process.join(None if last else moments.uniform(0, seconds))
                    if not process.is_alive():
                        break
                    process.kill()
                    process.join()
                    stages[_stage(root / "killed")] += 1
                    killed += 1
                    progress.advance()
                _check(process, root)
                runs += killed > 0
                same += killed > 0 and _manifest(root / "killed").read_bytes() == expected
                shutil.rmtree(root / "killed")
    found = ", ".join(f"{count} {stage}" for stage, count in stages.most_common())
    print(f"{sum(stages.values())} kills ({found}) in {runs} runs: {same} manifests are the same")
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
    write_random_llama(root / "model", tokenizer, _BLOCKS, hidden=48, head_dim=16)
    text = root / "text.txt"
    text.write_text(" ".join(random.Random(0).choices(["etao", "inshr", "dlu", "fig"], k=2000)))
    small = {"dataset": str(text), "num_windows": 6, "seqlen": 32}
    return {
        "model": str(root / "model"),
        # What compiles least: the time of a short process is that of its compiler.
        "vq": {"seed": "mahalanobis", "em_iterations": 1, "codebook_update": "none"}
        | {"polish_rounds": 0, "codebook_overhead": 0.5},
        "allocation": {"bits_per_value": 1.4, "bits": (0.5, 1.0), "em_iterations": 1},
        "calibration": {**small, "gradient_groups": 1, "asymmetry": 0.25},
        "tune": {"block": True, "epochs": 2, "held_out": 2},
        "evaluation": small,
    }


def _quantize(changes: dict, workdir: Path, log: Path) -> None:
    """What each process does; it prints to a file."""
    from gptvq_jax.config import default_config
    from gptvq_jax.run import quantize

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    config = default_config()
    config.update(changes)
    quantize(config, str(workdir))


def _manifest(workdir: Path) -> Path:
    return workdir / "checkpoint/manifest.json"


def _check(process, root: Path) -> None:
    if process.exitcode:
        last = (root / "log").read_text().strip().splitlines()[-1:]
        raise ValueError(f"a run that was left to its end failed: {''.join(last)}; see {root}/log")


def _stage(workdir: Path) -> str:
    """What was going on, by the files that are there."""
    if _manifest(workdir).exists():
        return "while evaluating"
    if (workdir / "checkpoint").exists():
        return "while quantizing"
    if any((workdir / "curves").glob("*")) or (workdir / "gradients/00000.npz").exists():
        return "while measuring curves"
    if any((workdir / "gradients").glob("*")):
        return "while computing gradients"
    return "before any work"


if __name__ == "__main__":
    cli.run(main, __doc__)
