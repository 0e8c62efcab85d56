"""Rows over eight (virtual) devices: what one device finds, for an eighth of its FLOP."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from eight_devices import CASES

QUICK = ("gptvq parts", "gptq", "aqlm", "trellis")
# Nothing is summed over rows, or it is summed in one device's order.
SAME_BYTES = ("gptvq parts", "gptq", "gptq ragged", "gptvq block scales", "trellis", "trellis int8")
# Rows that eight devices do not divide: some have padding.
UNEVEN = ("gptvq one strip",)


def on_eight_devices(names) -> dict:
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=8"
    folders = [str(Path(__file__).parents[level]) for level in (1, 2)]
    changed = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(folders)}
    script = Path(__file__).with_name("eight_devices.py")
    done = subprocess.run(
        [sys.executable, str(script), *names],
        env={**os.environ, **changed},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def quick():
    return on_eight_devices(QUICK)


@pytest.fixture(scope="module")
def others():
    return on_eight_devices([name for name in CASES if name not in QUICK])


def check(found: dict, name: str, record_property) -> None:
    record_property("codes that differ", found["codes that differ"])
    assert found["same kind"] and found["bits"][0] == found["bits"][1]
    assert abs(found["loss"]) <= 1e-5
    if CASES[name][0].__name__.endswith(("gptvq", "trellis", "uniform")):
        assert found["codes that differ"] == 0
    if name in SAME_BYTES:
        assert found["same bytes"]
    if name not in UNEVEN:
        assert 1 / 8 <= found["flop"] <= 1.15 / 8


@pytest.mark.parametrize("name", QUICK)
def test_eight_devices_find_what_one_does(quick, name, record_property):
    check(quick[name], name, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_every_setting_on_eight_devices(others, name, record_property):
    check(others[name], name, record_property)
