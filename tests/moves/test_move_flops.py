"""Every move on eight (virtual) devices: each has an eighth of one device's FLOP."""

from pathlib import Path

import pytest
from eight_devices_run import on_eight_devices


@pytest.mark.slow
def test_eight_devices_share_the_work_of_every_move():
    found = on_eight_devices(Path(__file__).with_name("move_flops.py"))
    assert len(found) >= 15
    # k-means++ compares a draw with the masses of all rows on every device: few steps, more FLOP.
    most = {"seed kmeans++": 1.2 / 8}
    too_much = {
        move: share
        for move, share in found.items()
        if not 0.99 / 8 <= share <= most.get(move, 1.15 / 8)
    }
    assert not too_much
