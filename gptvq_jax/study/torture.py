"""Small runs that are killed at random moments and resumed. What scripts/torture.py calls."""

import multiprocessing
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """What the kills did."""

    stages: Counter[str]  # kills by what was going on
    runs: int  # that were killed at least once, and came to their end
    same: int  # of them, with the manifest of a run that was left alone


def torture(
    root: Path, kills: int, seed: int, on_kill: Callable[[str], None] = lambda stage: None
) -> Outcome:
    """Kills processes of small runs with SIGKILL until there were `kills` of it.

    Each process is killed at a moment that is uniform over the time that a whole run takes, and
    another one goes on in the same work directory, until one is done before its moment comes.

    Args:
      root: directory for everything that is written.
      kills: how many.
      seed: of the moments.
      on_kill: called after each with what was going on.

    Raises:
      ValueError: a process that was left alone failed; says with what.
    """
    config = write_inputs(root)
    # Every program is compiled once, and quickly; processes start with all that is imported.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "xla"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    # JAX is imported, not started; and processes that are killed leave semaphores behind.
    quiet = "ignore:os.fork:RuntimeWarning", "ignore:resource_tracker:UserWarning"
    os.environ["PYTHONWARNINGS"] = ",".join(quiet)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["gptvq_jax.run.job", "matplotlib.pyplot", "transformers"])

    def is_killed(name: str, moment: float | None = None) -> bool:
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

    stages, moments = Counter(), random.Random(seed)
    for name in ("compiling", "whole"):
        begin = time.monotonic()
        is_killed(name)
    seconds = time.monotonic() - begin
    expected = _manifest(root / "whole").read_bytes()
    runs = same = 0
    while stages.total() < kills:
        before = stages.total()
        while stages.total() < kills and is_killed("killed", moments.uniform(0, seconds)):
            stage = _stage(root / "killed")
            stages[stage] += 1
            on_kill(stage)
        is_killed("killed")  # to its end, or no more than a look at what is finished
        if stages.total() > before:
            runs += 1
            same += _manifest(root / "killed").read_bytes() == expected
        shutil.rmtree(root / "killed")
    return Outcome(stages, runs, same)


def write_inputs(root: Path) -> dict[str, Any]:
    """Writes a random model and a text; returns what the config changes of the default.

    The run has token weights, an allocation of bits, an asymmetric target and block tuning, so that
    every kind of file is written.
    """
    from gptvq_jax.models.byte_tokenizer import byte_tokenizer
    from gptvq_jax.study.random_model import write_random_llama

    write_random_llama(root / "model", byte_tokenizer(), num_blocks=2, hidden=48, head_dim=16)
    text = root / "text.txt"
    text.write_text(" ".join(random.Random(0).choices(["etao", "inshr", "dlu", "fig"], k=2000)))
    small = {"num_windows": 6, "seqlen": 32}
    # What compiles least: nearly all of the time of such a run is the compiler's.
    vq = {"seed": "mahalanobis", "em_iterations": 1, "codebook_update": "none", "polish_rounds": 0}
    return {
        "model": str(root / "model"),
        "vq": {**vq, "codebook_overhead": 0.5},
        "allocation": {"bits_per_value": 1.4, "bits": (0.5, 1.0), "em_iterations": 1},
        "calibration": {
            **small,
            "datasets": (str(text),),
            "gradient_groups": 1,
            "asymmetry": 0.25,
        },
        "tune": {"block": True, "epochs": 2},
        "evaluation": {**small, "dataset": str(text)},
    }


def _quantize(changes: dict[str, Any], workdir: Path, log: Path) -> None:
    """What each process does; it prints to a file."""
    from gptvq_jax.config import default_config
    from gptvq_jax.run.job import quantize

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
