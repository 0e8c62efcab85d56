"""Ctrl-C at random moments of a real run: one line, status 130, and the run goes on."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/quantize.py"
CONFIG = """
from gptvq_jax.config import default_config
def get_config():
    c = default_config()
    c.model, c.num_blocks = {model!r}, 2
    c.vq.bits, c.vq.group_size, c.vq.em_iterations = 1.0, 2048, 1
    c.vq.codebook_update, c.vq.polish_rounds = "none", 0
    c.calibration.dataset, c.evaluation.dataset = {texts!r}
    c.calibration.num_windows, c.calibration.seqlen = 6, 32
    c.evaluation.num_windows, c.evaluation.seqlen = 4, 32
    return c
"""


@pytest.mark.slow
def test_ctrl_c_at_any_moment(model_dir, text_files, tmp_path):
    (tmp_path / "c.py").write_text(CONFIG.format(model=str(model_dir), texts=text_files))
    command = [sys.executable, SCRIPT, f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path}/w"]

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
