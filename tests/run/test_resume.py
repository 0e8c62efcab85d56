"""kill -9 and run again: the same checkpoint, bit for bit. Runs the real script, three times.

Runs that are stopped and go on in one process are in test_pipeline, test_finetune, test_gradients
and test_allocation.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import config_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(tmp_path, model_dir, text_files):
    """A quantize.py command line on the tiny model, and its environment."""
    config = config_file(
        tmp_path / "tiny.py",
        model_dir,
        text_files,
        "config.vq.bits, config.vq.group_size, config.vq.em_iterations = 1.0, 2048, 1",
    )
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}

    def start(workdir):
        line = [sys.executable, ROOT / "scripts/quantize.py", f"--config={config}"]
        return subprocess.Popen(
            [*map(str, line), f"--workdir={tmp_path / workdir}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.mark.slow
def test_killed_run_resumes_bit_identically(command, tmp_path):
    whole = command("whole")
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output
    expected = (tmp_path / "whole/checkpoint/manifest.json").read_bytes()

    # Killed as soon as block 1 shows on disk, finished or not.
    process = command("killed")
    while not (tmp_path / "killed/checkpoint/blocks/00001").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed/checkpoint/manifest.json").exists()

    process = command("killed")
    resumed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, resumed
    # The manifest holds a SHA-256 of the arrays of every layer.
    assert (tmp_path / "killed/checkpoint/manifest.json").read_bytes() == expected
    assert perplexity_line(resumed) == perplexity_line(output)


def perplexity_line(output):
    return next(line for line in output.splitlines() if line.strip().startswith("perplexity"))
