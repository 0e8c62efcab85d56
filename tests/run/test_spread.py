"""Windows over eight devices give what one device gives; an eighth of the work is each one's."""

from pathlib import Path

import pytest
from eight_devices_run import on_eight_devices

from gptvq_jax.run.calibrate import batches


@pytest.mark.parametrize("model", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_one_device_against_eight(tmp_path, model):
    program = Path(__file__).with_name("windows_on_devices.py")
    flops = on_eight_devices(program, str(tmp_path), model)
    # Of experts the compiler counts a loop once, however often it is gone through.
    assert model == "mixtral" or flops["eight"] <= 1.15 / 8 * flops["one"]


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
