"""Rows over eight (virtual) devices: what one device finds, for an eighth of its FLOP."""

from pathlib import Path

import pytest
from eight_devices_run import on_eight_devices
from layers_on_devices import CASES

QUICK = ("gptvq parts", "trellis")
# Nothing is summed over rows, or it is summed in one device's order.
SAME_BYTES = ("gptvq parts", "gptq", "gptq ragged", "gptvq block scales", "trellis", "trellis int8")
# Each device has 13 of 100 rows, some of them padding; noise is drawn for all rows on all devices.
NOT_AN_EIGHTH = ("gptvq one strip", "aqlm random")
SCRIPT = Path(__file__).with_name("layers_on_devices.py")


@pytest.fixture(scope="module")
def quick():
    return on_eight_devices(SCRIPT, *QUICK)


@pytest.fixture(scope="module")
def others():
    return on_eight_devices(SCRIPT, *(name for name in CASES if name not in QUICK))


def check(found: dict, name: str) -> None:
    assert found["same kind"] and found["bits"][0] == found["bits"][1]
    assert abs(found["loss"]) <= 1e-5
    print(f"{name}: {found['codes that differ']:.2%} of the bytes of codes differ")
    assert found["codes that differ"] <= 0.001
    if name in SAME_BYTES:
        assert found["same bytes"]
    if name not in NOT_AN_EIGHTH:
        assert 0.99 / 8 <= found["flop"] <= 1.15 / 8


@pytest.mark.parametrize("name", QUICK)
def test_eight_devices_find_what_one_does(quick, name):
    check(quick[name], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_every_setting_on_eight_devices(others, name):
    check(others[name], name)


@pytest.mark.slow
def test_layers_as_a_run_quantizes_them():
    assert on_eight_devices(SCRIPT) == {"same kind": True, "same bytes": True}
