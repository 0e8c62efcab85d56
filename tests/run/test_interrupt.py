"""Ctrl-C at random moments of a real run: one line, status 130, and the run goes on."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import config_file

SCRIPT = Path(__file__).parents[2] / "scripts/quantize.py"


@pytest.mark.slow
def test_ctrl_c_at_any_moment(model_dir, text_files, tmp_path):
    config = config_file(
        tmp_path / "c.py",
        model_dir,
        text_files,
        "config.num_blocks = 2",
        "config.vq.bits, config.vq.group_size, config.vq.em_iterations = 1.0, 2048, 1",
    )
    command = [sys.executable, SCRIPT, f"--config={config}", f"--workdir={tmp_path}/w"]

    def start():
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    began = time.monotonic()
    whole = start()
    assert whole.communicate()[0] and whole.returncode == 0
    seconds = time.monotonic() - began
    generator = random.Random(0)
    for attempt in range(6):
        command[-1] = f"--workdir={tmp_path}/w{attempt // 3}"  # three times into one run
        process = start()
        # Python itself takes a moment until it runs a line of ours.
        time.sleep(generator.uniform(0.5, seconds))
        process.send_signal(signal.SIGINT)
        if attempt % 2:
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
        if process.returncode == 0:  # it was faster than before
            continue
        assert process.returncode == 130, errors
        assert errors.endswith("interrupted\n")
        assert "Traceback" not in errors and "Exception ignored" not in errors
    last = start()
    assert last.communicate()[0] and last.returncode == 0
