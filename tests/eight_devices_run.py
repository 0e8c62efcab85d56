"""Starts a script of the tests where JAX shows eight devices, and reads what it prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def on_eight_devices(script: Path, *arguments: str) -> dict:
    """The JSON object that a script prints."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    folders = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    changed = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": folders}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, **changed},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
