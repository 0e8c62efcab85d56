"""Of sweeps on a tiny model."""

import pytest

from gptvq_jax.study.sweep import start


@pytest.fixture
def base(tiny_config):
    """Nothing to solve, and both streams of the float model."""
    tiny_config.method, tiny_config.calibration.asymmetry = "rtn", 0.25
    return tiny_config


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Which takes as long as all else; and no measurement of this machine."""
    monkeypatch.setattr("gptvq_jax.console.layer_plot.plot", lambda *_: None)
    monkeypatch.setattr(start, "matmul_rate", lambda: 1e11)
