"""Windows over eight devices give what one device gives; an eighth of the work is each one's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptvq_jax.run.calibrate import batches


def test_one_device_against_eight(tmp_path):
    flags = "--xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    program = Path(__file__).with_name("eight_devices.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FLOP of a device" in done.stdout


@pytest.mark.parametrize(
    "count, batch_size, devices, sizes",
    [
        (6, 4, 1, [3, 3]),
        (7, 4, 1, [1] * 7),
        (32, 4, 8, [8] * 4),  # one for each device, at least
        (32, 20, 8, [16, 16]),
        (30, 4, 8, [8, 8, 8, 6]),
        (3, 4, 8, [3]),
    ],
)
def test_batches_are_of_equal_size_where_devices_divide_the_windows(
    count, batch_size, devices, sizes
):
    parts = list(batches(count, batch_size, devices))
    assert [part.stop - part.start for part in parts] == sizes
    assert [part.start for part in parts] == [sum(sizes[:n]) for n in range(len(sizes))]
